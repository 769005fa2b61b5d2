"""Prompts that are read once give what rows that are read one by one give: values and gradients."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from reasonrec.recipes.decoding import shared_prefix
from reasonrec.recipes.decoding.shared_prefix import can_share, shared_hidden
from reasonrec.recipes.policies.base import install
from reasonrec.recipes.policies.semantic_id import CodeAnswers
from reasonrec.tokenizers.trie import Trie
from reasonrec.tokenizers.vocabulary import Vocabulary

SIZE = {
    "vocab_size": 30, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "initializer_range": 0.4, "pad_token_id": 0,
}  # fmt: skip
BEGIN = 20
# Three prompts of different lengths, which three, one and two completions of different lengths follow, not in order.
ROWS = [
    ([5, 6, 7, BEGIN], [21, 24, 1]),
    ([8, BEGIN], [22, 25, 1]),
    ([5, 6, 7, BEGIN], [22, 26, 1]),
    ([9, 9, 9, 9, 4, BEGIN], [21, 1]),
    ([8, BEGIN], [21, 24, 1]),
    ([5, 6, 7, BEGIN], [21, 24, 1]),
]


@pytest.fixture(autouse=True)
def always_worth_it(monkeypatch):
    """These batches are too small for sharing to pay."""
    monkeypatch.setattr(shared_prefix, "WORTH", 1.0)


def make_model(attention: str = "sdpa") -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM._from_config(LlamaConfig(**SIZE), attn_implementation=attention)


def batch(rows=ROWS) -> tuple[torch.Tensor, torch.Tensor, int]:
    p, c = (max(len(row[i]) for row in rows) for i in (0, 1))
    ids = torch.tensor([[0] * (p - len(a)) + a + b + [0] * (c - len(b)) for a, b in rows])
    mask = torch.tensor([[0] * (p - len(a)) + [1] * (len(a) + len(b)) + [0] * (c - len(b)) for a, b in rows])
    return ids, mask, p


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_hidden_states_are_those_of_each_row(attention):
    model = make_model(attention)
    ids, mask, first = batch()
    shared = shared_hidden(model, ids, mask, first)
    assert shared is not None
    for row, (prompt, completion) in enumerate(ROWS):
        alone = model.base_model(input_ids=torch.tensor([prompt + completion])).last_hidden_state[0]
        expected = alone[len(prompt) - 1 : -1]
        torch.testing.assert_close(shared[row, : len(completion)], expected, atol=1e-5, rtol=1e-4)


def test_each_prompt_is_read_once(monkeypatch):
    model = make_model()
    inner, read = model.base_model.forward, []

    def count(*args, **kwargs):
        read.append(tuple(kwargs["input_ids"].shape))
        return inner(*args, **kwargs)

    monkeypatch.setattr(model.base_model, "forward", count)
    ids, mask, first = batch()
    shared_hidden(model, ids, mask, first)
    assert read == [(3, 6 + 3 * 2)], "three prompts of at most six tokens, at most three branches of two"


def test_nothing_is_done_where_little_is_shared(monkeypatch):
    model = make_model()
    monkeypatch.setattr(shared_prefix, "WORTH", 0.99)
    assert shared_hidden(model, *batch([ROWS[0], ROWS[1], ROWS[3]])) is None
    assert shared_hidden(model, *batch()) is not None
    monkeypatch.setattr(shared_prefix, "WORTH", 0.5)
    assert shared_hidden(model, *batch()) is None


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_policys_values_and_gradients_stay_the_same(monkeypatch, method):
    from reasonrec.recipes.models.load import LoraSettings, add_adapter

    vocabulary = Vocabulary((3, 3), BEGIN)
    trie = Trie.from_codes(torch.tensor([[0, 0], [0, 1], [1, 1], [1, 2]]).numpy(), (3, 3))
    ids, mask, first = batch()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :first] = -100
    found = []
    for worth in (0.0, 1.0):
        monkeypatch.setattr(shared_prefix, "WORTH", worth)
        base = model = make_model()
        if method == "lora":
            torch.manual_seed(1)
            model = add_adapter(base, vocabulary.token_ids, LoraSettings(2, 4, 0.0, "all-linear"))
        install(base, CodeAnswers(trie, vocabulary), temperature=0.5, answers_only=True)
        out = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
        (out.log_probs * torch.arange(1, 7)[:, None]).sum().backward()
        found.append((out, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}))
    (plain, gradients), (shared, others) = found
    for name in ("log_probs", "entropy", "label_mask", "is_top1"):
        torch.testing.assert_close(getattr(plain, name), getattr(shared, name), atol=1e-5, rtol=1e-4, msg=name)
    assert plain.log_probs.shape == (6, ids.shape[1] - 1)
    assert plain.log_probs.abs().sum() > 0
    for name, gradient in gradients.items():
        if gradient is not None:
            torch.testing.assert_close(gradient, others[name], atol=1e-4, rtol=1e-3, msg=name)


def test_layers_that_take_no_mask_are_left_alone():
    assert can_share(make_model())
    sliding = MistralForCausalLM(MistralConfig(**SIZE, sliding_window=4))
    assert not can_share(sliding)
    assert shared_hidden(sliding, *batch()) is None
