"""Code rows: what they start from, and that they are read where PEFT really keeps them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from reasonrec.recipes.models.load import LoraSettings, add_adapter
from reasonrec.tokenizers.rows import code_logits, new_rows, scale_logits, text_rows
from reasonrec.tokenizers.vocabulary import Vocabulary

TEXT = 10
VOCABULARY = Vocabulary((2, 3), begin_id=TEXT)
LORA = LoraSettings(2, 4, 0.0, "all-linear")


class WordTokenizer:
    """Words `0` … `9` are the ids 0 … 9."""

    def __call__(self, texts, *, add_special_tokens, truncation, max_length):
        assert not add_special_tokens
        assert truncation
        return {"input_ids": [[int(word) for word in text.split()][:max_length] for text in texts]}


def small_model(*, tied: bool = True, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY.size,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def rows_of(embedding: torch.Tensor, codes: list[list[int]], texts: list[str]) -> torch.Tensor:
    return text_rows(embedding, WordTokenizer(), VOCABULARY, np.array(codes), texts)


def test_rows_from_text_by_hand():
    """Two known vectors, on the axes: (1, 0) and (0, 1), ten of them, so the mean is (.5, .5)."""
    embedding = torch.tensor([[1.0, 0.0], [0.0, 1.0]] * 5 + [[9.0, 9.0]] * 6)  # spare rows are not read
    rows = rows_of(embedding, [[0, 0], [0, 1], [1, -1], [1, 1]], ["0", "1 1", "0 2 1 3", "0 0 0 1"])
    # Items: (1, 0), (0, 1), (.5, .5), (.75, .25). Level 0: code 0 has mean (.5, .5), code 1 (.625, .375), all of them
    # (.5625, .4375): the deviations are opposite, along (1, -1). An ordinary token is √.5 from the mean.
    half = 0.5
    expected = {
        "begin": [0.5, 0.5],
        "a_0": [0.5 - half, 0.5 + half],
        "a_1": [0.5 + half, 0.5 - half],
        # Level 1 has the items 0, 1 and 3 only, with mean (7/12, 5/12); code 1 is (3/8, 5/8).
        "b_0": [0.5 + half, 0.5 - half],
        "b_1": [0.5 - half, 0.5 + half],
        "b_2": [0.5, 0.5],  # carried by nobody
    }
    torch.testing.assert_close(rows, torch.tensor(list(expected.values())), atol=1e-6, rtol=1e-5)
    assert rows.dtype == torch.float32


def test_deviations_have_the_length_of_an_ordinary_token():
    embedding = torch.randn(TEXT, 16, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    rows = rows_of(embedding, [[0, 0], [1, 1], [1, 2], [0, 2]], ["0 1", "2", "3 4 5", "6"])
    mean = embedding.float().mean(0)
    spread = (embedding.float() - mean).norm(dim=1).mean()
    torch.testing.assert_close((rows[1:] - mean).norm(dim=1), spread.expand(5), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rows[0], mean)


def test_items_without_text_and_levels_without_items():
    embedding = torch.eye(TEXT)
    rows = rows_of(embedding, [[0, -1], [1, -1]], ["", "3"])
    mean = embedding.mean(0)
    torch.testing.assert_close(rows[3:], mean.expand(3, -1))
    # The textless item stands at the mean, so the two codes lie opposite each other.
    torch.testing.assert_close(rows[1] + rows[2], 2 * mean, atol=1e-6, rtol=1e-5)
    assert rows[2, 3] > rows[1, 3]
    same = rows_of(embedding, [[0, -1], [1, -1]], ["3", "3"])
    torch.testing.assert_close(same, mean.expand(6, -1))
    assert torch.isfinite(rows).all()


def test_rows_outside_peft_are_a_slice_of_the_weight():
    model = small_model()
    rows = new_rows(model.get_input_embeddings(), VOCABULARY)
    assert torch.equal(rows, model.get_input_embeddings().weight[TEXT:])
    rows.sum().backward()
    grad = model.get_input_embeddings().weight.grad
    assert grad[TEXT:].eq(1).all()
    assert grad[:TEXT].eq(0).all()


@pytest.mark.parametrize("tied", [True, False])
def test_rows_inside_peft_are_the_trained_ones(tied):
    model = small_model(tied=tied)
    before = new_rows(model.get_output_embeddings(), VOCABULARY).detach().clone()
    wrapped = add_adapter(model, VOCABULARY.token_ids, LORA)
    tables = model.get_input_embeddings(), model.get_output_embeddings()
    assert torch.equal(new_rows(tables[1], VOCABULARY), before)
    deltas = [p for n, p in wrapped.named_parameters() if "trainable_tokens" in n]
    assert len(deltas) == (1 if tied else 2)
    with torch.no_grad():
        for number, delta in enumerate(deltas):
            delta.copy_(torch.full_like(delta, number + 1.0))
    for number, table in enumerate(tables):
        rows = new_rows(table, VOCABULARY)
        assert rows.requires_grad
        assert rows.eq(1.0 if tied else number + 1.0).all()
    with wrapped.disable_adapter():
        assert torch.equal(new_rows(tables[1], VOCABULARY), before)
    wrapped.merge_adapter()
    assert new_rows(tables[1], VOCABULARY).eq(1.0 if tied else 2.0).all()
    wrapped.unmerge_adapter()
    assert new_rows(tables[1], VOCABULARY).eq(1.0 if tied else 2.0).all()


def full_logits(model, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits[..., VOCABULARY.first_id : VOCABULARY.size].float()


def code_logits_of(model, ids: torch.Tensor) -> torch.Tensor:
    return code_logits(model, model.base_model(input_ids=ids).last_hidden_state, VOCABULARY)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, VOCABULARY.size, (3, 7), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": False}),
        ("phi", {}),  # a bias
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 8.0}),  # a divisor
        ("gemma2", {"head_dim": 16, "final_logit_softcapping": 1.5}),
    ],
)
def test_code_logits_are_those_of_the_full_head(name, options, ids):
    config = AutoConfig.for_model(
        name,
        vocab_size=VOCABULARY.size + 3,  # rows behind the codes
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.5,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        **options,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    bias = getattr(model.get_output_embeddings(), "bias", None)
    assert (bias is not None) == (name == "phi")
    if bias is not None:
        torch.nn.init.normal_(bias)
    with torch.no_grad():
        full, codes = full_logits(model, ids), code_logits_of(model, ids)
        plain = model.base_model(input_ids=ids).last_hidden_state @ new_rows(model.lm_head, VOCABULARY)[1:].T
    assert codes.shape == (3, 7, 5)
    torch.testing.assert_close(codes, full, atol=1e-5, rtol=1e-5)
    # Without scale, cap and bias the numbers would be others: the case tests what it names.
    assert torch.allclose(plain, full, atol=1e-3) == (name == "llama")


@pytest.mark.parametrize("tied", [True, False])
def test_code_logits_with_lora_and_moved_rows(tied, ids):
    model = small_model(tied=tied)
    untouched = copy.deepcopy(model)
    wrapped = add_adapter(model, VOCABULARY.token_ids, LORA).eval()
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
        codes = code_logits_of(model, ids)
        torch.testing.assert_close(codes, full_logits(wrapped, ids), atol=1e-5, rtol=1e-5)
        before = full_logits(untouched, ids)
        assert (codes - before).abs().max() > 0.1
        with wrapped.disable_adapter():
            torch.testing.assert_close(code_logits_of(model, ids), before, atol=1e-5, rtol=1e-5)
        wrapped.merge_adapter()
        torch.testing.assert_close(code_logits_of(model, ids), codes, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_the_gradient_of_code_logits_reaches_the_trained_rows_alone(tied, ids):
    wrapped = add_adapter(small_model(tied=tied), VOCABULARY.token_ids, LORA)
    model = wrapped.get_base_model()
    hidden = model.base_model(input_ids=ids).last_hidden_state.detach()
    code_logits(model, hidden, VOCABULARY).sum().backward()
    reached = {n: p.grad for n, p in wrapped.named_parameters() if p.grad is not None}
    (name,) = reached
    assert "trainable_tokens" in name
    assert ("lm_head" in name) == (not tied)
    torch.testing.assert_close(reached[name][0], torch.zeros(32))  # the begin marker is never an answer's code
    torch.testing.assert_close(reached[name][1:], hidden.sum((0, 1)).expand(5, -1), atol=1e-5, rtol=1e-5)


def test_code_logits_are_float32_under_autocast(ids):
    """Training in bf16 must not round what the decoder does not round."""
    model = small_model()
    hidden = model.base_model(input_ids=ids).last_hidden_state.detach()
    exact = code_logits(model, hidden, VOCABULARY)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = code_logits(model, hidden, VOCABULARY)
    assert again.dtype == torch.float32
    assert torch.equal(again, exact)


def test_scale_and_cap_by_hand():
    class Model:
        config = AutoConfig.for_model("gemma2", final_logit_softcapping=2.0)

    logits = torch.tensor([0.0, 1.0, 100.0])
    torch.testing.assert_close(scale_logits(Model(), logits), torch.tensor([0.0, 2 * np.tanh(0.5), 2.0]).float())
    Model.config = AutoConfig.for_model("cohere", logit_scale=0.0625)
    torch.testing.assert_close(scale_logits(Model(), logits), logits / 16)
    Model.config = AutoConfig.for_model("granite", logits_scaling=4.0)
    torch.testing.assert_close(scale_logits(Model(), logits), logits / 4)
    Model.config = AutoConfig.for_model("llama")
    assert torch.equal(scale_logits(Model(), logits), logits)
