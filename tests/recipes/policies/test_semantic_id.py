"""The policy that trains is the policy that recommends."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast

from reasonrec.recipes.decoding.score import score_all_items
from reasonrec.recipes.decoding.search import beam_search
from reasonrec.recipes.models.load import LoraSettings, add_adapter, load_base
from reasonrec.recipes.models.precision import choose
from reasonrec.recipes.policies import base
from reasonrec.recipes.policies.base import install
from reasonrec.recipes.policies.semantic_id import CodeAnswers, prefix_nodes
from reasonrec.tokenizers.trie import Trie
from reasonrec.tokenizers.vocabulary import Vocabulary

TEXT = 12
SIZES = (3, 4, 2)
VOCABULARY = Vocabulary(SIZES, begin_id=TEXT)
BEGIN = TEXT
# Level 0 has three codes, code 1 has one child only (a forced step), and (0, 2) two items that need a third code.
CODES = np.array([[0, 0, -1], [0, 2, 0], [0, 2, 1], [1, 3, -1], [2, 0, -1], [2, 1, -1], [2, 3, -1]])
TRIE = Trie.from_codes(CODES, SIZES)
IDS = VOCABULARY.item_token_ids(CODES)
LORA = LoraSettings(2, 4, 0.0, "all-linear")


def small_config(**options):
    return LlamaConfig(
        vocab_size=VOCABULARY.size,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        max_position_embeddings=128,
        **options,
    )


def small_model(*, tied: bool = True, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(small_config(tie_word_embeddings=tied)).eval()


class Canned(nn.Module):
    """A causal LM whose hidden states are one-hot in the input token, so that the head is a table of logits."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.config = small_config()
        self.embedding = nn.Embedding(VOCABULARY.size, 1)
        self.lm_head = nn.Linear(VOCABULARY.size, VOCABULARY.size, bias=False)
        self.lm_head.weight = nn.Parameter(logits.T.contiguous())

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def base_model(self, input_ids, **_) -> BaseModelOutputWithPast:
        one_hot = nn.functional.one_hot(input_ids, VOCABULARY.size).float()
        return BaseModelOutputWithPast(last_hidden_state=one_hot)

    def forward(self, **_) -> str:
        return "the model's own forward"


def item_labels(prompt: list[int], item: int) -> tuple[list[int], list[int]]:
    return prompt + IDS[item], [-100] * len(prompt) + IDS[item]


def batch(examples: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """Right-padded, as TRL's collator does."""
    width = max(len(ids) for ids, _ in examples)
    return {
        "input_ids": torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in examples]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in examples]),
        "labels": torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in examples]),
    }


def score(model, examples, **options):
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    if "forward" not in vars(base):
        install(base, CodeAnswers(TRIE, VOCABULARY))
    return model(**batch(examples), fused_lm_head=True, **options)


def test_the_loss_by_hand():
    """Begin marker, then (0, 2, 1): log-softmax over 3, 2 and 2 legal children of logits that are written down."""
    a0, a1, a2, b0, _, b2, _, c0, c1 = range(VOCABULARY.first_id, VOCABULARY.size)
    logits = torch.full((VOCABULARY.size, VOCABULARY.size), 50.0)  # everything illegal is most tempting
    logits[BEGIN, [a0, a1, a2]] = torch.tensor([1.0, 2.0, 3.0])
    logits[a0, [b0, b2]] = torch.tensor([0.5, -0.5])
    logits[b2, [c0, c1]] = torch.tensor([0.0, 4.0])
    logits[5] = 0.0
    out = score(Canned(logits), [([5, BEGIN, a0, b2, c1, 5, 7], [-100, -100, a0, b2, c1, -100, 7])])
    chances = np.array([np.e / (np.e + np.e**2 + np.e**3), 1 / (1 + np.e), 1 / (1 + np.exp(-4.0))])
    text = -np.log(VOCABULARY.size)
    expected = np.array([0, *np.log(chances), 0, text])
    np.testing.assert_allclose(out.log_probs[0].detach(), expected, atol=1e-5)
    assert float(out.loss) == pytest.approx(-expected.sum() / 4, abs=1e-5)
    two = [-(p * np.log(p) + (1 - p) * np.log(1 - p)) for p in chances[1:]]
    first = np.exp([1.0, 2.0, 3.0]) / np.exp([1.0, 2.0, 3.0]).sum()
    np.testing.assert_allclose(out.entropy[0], [0, -(first * np.log(first)).sum(), *two, 0, -text], atol=1e-5)
    assert out.is_top1[0, 1:4].tolist() == [False, False, True]
    assert out.label_mask.tolist() == [[False, True, True, True, False, True]]


def test_other_calls_are_left_alone():
    model = Canned(torch.zeros(VOCABULARY.size, VOCABULARY.size))
    install(model, CodeAnswers(TRIE, VOCABULARY))
    assert model(input_ids=torch.zeros(1, 1)) == "the model's own forward"
    assert model(input_ids=torch.zeros(1, 1), fused_lm_head=False) == "the model's own forward"


def test_the_number_of_items_in_the_batch_may_be_given():
    model = small_model()
    example = item_labels([3, BEGIN], 1)
    own = score(model, [example])
    given = score(model, [example], num_items_in_batch=torch.tensor(30))
    assert float(given.loss) == pytest.approx(float(own.loss) * 3 / 30)


def test_forced_steps_cost_nothing_and_have_no_gradient():
    model = small_model()
    ids, labels = item_labels([3, BEGIN], 3)  # (1, 3): nothing but 3 follows 1
    labels[-2] = -100
    out = score(model, [(ids, labels)])
    assert out.log_probs.abs().max() == 0
    assert out.entropy.abs().max() == 0
    out.loss.backward()
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in model.parameters())


def adapted(kind: str, tmp_path):
    if kind in ("tied", "untied"):
        return small_model(tied=kind == "tied")
    if kind == "gemma2":
        torch.manual_seed(0)
        options = small_config(tie_word_embeddings=True).to_dict() | {"head_dim": 32, "final_logit_softcapping": 2.0}
        options.pop("model_type")
        options.pop("architectures", None)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma2", **options)).eval()
    model = small_model(tied="untied" not in kind)
    if "qlora" in kind:
        model.save_pretrained(tmp_path)
        model = load_base(str(tmp_path), method="qlora", precision=choose("fp32", "cpu"))
    wrapped = add_adapter(model, VOCABULARY.token_ids, LORA).eval()
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    return wrapped


@pytest.mark.parametrize("kind", ["tied", "untied", "gemma2", "lora", "lora untied", "qlora"])
def test_the_log_probability_is_that_of_the_search(kind, tmp_path):
    """The same items after the same prompts, once as labels and once as found by the decoder."""
    model = adapted(kind, tmp_path)
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    prompts = [[4, *IDS[6], *IDS[1], BEGIN], [4, *IDS[3], BEGIN], [BEGIN]]
    width = max(map(len, prompts))
    input_ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    exact = score_all_items(base, TRIE, VOCABULARY, input_ids, mask, item_token_ids=IDS)
    found = beam_search(base, TRIE, VOCABULARY, input_ids, mask, k=len(CODES), num_beams=len(CODES))
    examples = [item_labels(prompt, item) for prompt in prompts for item in range(len(CODES))]
    with torch.no_grad():
        trained = score(model, examples).log_probs.sum(1).view(len(prompts), len(CODES))
    torch.testing.assert_close(trained, exact, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(trained.exp().sum(1), torch.ones(3), atol=1e-5, rtol=0)
    by_item = torch.empty_like(found.scores).scatter_(1, found.items, found.scores)
    torch.testing.assert_close(trained, by_item, atol=1e-4, rtol=1e-4)
    assert trained.std(1).min() > 0.3, "far from uniform, or the comparison would say little"


def test_an_item_inside_a_history_is_scored_from_its_own_root():
    """Whole-history training: no begin marker stands in front of the items, and two may share all their codes."""
    model = small_model()
    history = [1, 2, 0, 3]
    tokens = [t for item in history for t in IDS[item]]
    out = score(model, [([4, *tokens], [-100, *tokens])])
    at = 1
    for item in history:
        alone = score(model, [item_labels([4, *tokens[: at - 1]], item)])
        stop = at - 1 + len(IDS[item])
        torch.testing.assert_close(out.log_probs[0, at - 1 : stop], alone.log_probs[0, at - 1 :])
        at += len(IDS[item])


def test_prefix_nodes_by_hand():
    tokens = torch.tensor([[4, *IDS[1], *IDS[3], BEGIN, *IDS[2]]])
    positions = torch.tensor([1, 2, 3, 4, 5, 7, 8, 9])
    nodes = prefix_nodes(TRIE, VOCABULARY, tokens, torch.zeros(8, dtype=torch.int64), positions)
    a0 = TRIE.child(torch.tensor(0), torch.tensor(0))
    a1 = TRIE.child(torch.tensor(0), torch.tensor(1))
    a0_b2 = TRIE.child(a0, torch.tensor(SIZES[0] + 2))
    assert nodes.tolist() == [0, int(a0), int(a0_b2), 0, int(a1), 0, int(a0), int(a0_b2)]


@pytest.mark.parametrize("item", [[0, 1], [1, 3, 0], [0, 0, 1]], ids=str)
def test_labels_of_another_index_are_refused(item):
    ids = [sum(SIZES[:level]) + VOCABULARY.first_id + code for level, code in enumerate(item)]
    with pytest.raises(ValueError, match="another index"):
        score(small_model(), [([4, BEGIN, *ids], [-100, -100, *ids])])


def test_padding_and_ignored_labels_change_nothing():
    model = small_model()
    long, short = item_labels([4, *IDS[2], *IDS[6], BEGIN], 1), item_labels([5, BEGIN], 4)
    alone = score(model, [short])
    together = score(model, [long, short])
    n = len(short[0]) - 1
    torch.testing.assert_close(together.log_probs[1, :n], alone.log_probs[0], atol=1e-5, rtol=1e-5)
    assert together.log_probs[1, n:].eq(0).all()
    assert together.entropy[1, n:].eq(0).all()
    assert not together.is_top1[1, n:].any()
    assert together.label_mask.sum() == 5
    one_less = (long[0], [*long[1][:-1], -100])
    assert score(model, [one_less]).log_probs[0, -1] == 0


def test_a_batch_without_labels_is_a_zero_that_reaches_every_parameter():
    model = small_model()
    out = score(model, [([4, 5, 6], [-100] * 3)])
    assert float(out.loss) == 0
    out.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    assert all(g is not None and g.abs().max() == 0 for g in grads.values())


@pytest.mark.parametrize("kind", ["lora", "lora untied", "qlora"])
def test_the_gradient_reaches_rows_and_lora_and_nothing_else(kind, tmp_path):
    model = adapted(kind, tmp_path)
    examples = [item_labels([4, *IDS[1], BEGIN], item) for item in (0, 4, 5)]
    score(model, examples).loss.backward()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
    (head,) = [
        p for n, p in model.named_parameters() if "trainable_tokens" in n and (kind != "lora untied" or "head" in n)
    ]
    if (
        kind == "lora untied"
    ):  # its head learns from labels alone: siblings only, level 2 of items 1 and 2 is not asked
        assert head.grad[0].abs().max() == 0
        assert head.grad[-2:].abs().max() == 0


def test_the_loss_is_a_true_gradient():
    """Finite differences along the gradient, through prefix lookup, masking and scatter."""
    model = small_model().double()
    examples = [item_labels([4, *IDS[6], BEGIN], 1), item_labels([BEGIN], 4)]
    loss = score(model, examples).loss
    loss.backward()
    rows = model.get_input_embeddings().weight
    direction = rows.grad / rows.grad.norm()
    moved = []
    for step in (3e-4, -3e-4):
        with torch.no_grad():
            rows += step * direction
            moved.append(float(score(model, examples).loss))
            rows -= step * direction
    assert (moved[0] - moved[1]) / 6e-4 == pytest.approx(float(rows.grad.norm()), rel=2e-3)


@pytest.mark.parametrize("tied", [True, False])
def test_text_is_scored_over_the_whole_vocabulary_in_chunks(tied, monkeypatch):
    monkeypatch.setattr(base, "TEXT_CHUNK", 4)
    model = small_model(tied=tied)
    wrapped = add_adapter(model, VOCABULARY.token_ids, LORA)
    tokens = torch.randint(0, TEXT, (2, 8))
    full = wrapped(input_ids=tokens).logits[:, :-1].float().log_softmax(-1)
    expected = full.gather(-1, tokens[:, 1:, None])[..., 0]
    expected[:, :2] = 0
    labels = tokens.clone()
    labels[:, :3] = -100
    install(model, CodeAnswers(TRIE, VOCABULARY))
    out = wrapped(input_ids=tokens, labels=labels, fused_lm_head=True)
    torch.testing.assert_close(out.log_probs, expected, atol=1e-5, rtol=1e-5)
    (plain,) = torch.autograd.grad(-expected.sum() / 10, _first_lora(wrapped), retain_graph=True)
    (ours,) = torch.autograd.grad(out.loss, _first_lora(wrapped))
    torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-4)
    assert ours.abs().max() > 0


def _first_lora(model):
    return next(p for n, p in model.named_parameters() if "lora_B" in n)
