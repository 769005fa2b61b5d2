"""Soft targets by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reasonrec.recipes.policies.base import TEACHER_ROWS, install
from reasonrec.recipes.policies.semantic_id import CodeAnswers
from reasonrec.recipes.policies.soft import SoftCodes, child_shares, soft_log_likelihood
from reasonrec.tokenizers.trie import Trie
from reasonrec.tokenizers.vocabulary import Vocabulary

SIZES = (3, 4, 2)
# (0, 2) has two items that need a third code; code 1 has one child only.
CODES = np.array([[0, 0, -1], [0, 2, 0], [0, 2, 1], [1, 3, -1], [2, 0, -1], [2, 1, -1], [2, 3, -1]])
TRIE = Trie.from_codes(CODES, SIZES)


def test_shares_of_children() -> None:
    """Two parents; siblings 4, 5, 6 and 8; items below them, elsewhere, and behind the end of their answer."""
    child = torch.tensor([[4, 5, 6], [8, -1, -1]])
    node = torch.tensor([[6, 4, 7, 6], [8, 9, -1, 7]])
    share = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25]])
    expected = torch.tensor([[0.3, 0.0, 0.5], [0.25, 0.0, 0.0]])
    torch.testing.assert_close(child_shares(child, node, share), expected)
    assert child_shares(torch.tensor([[-1]]), torch.tensor([[-1, 3]]), torch.ones(1, 2)).sum() == 0


def test_likelihood() -> None:
    log_probs = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.4, 0.0]]).log()
    is_target = torch.tensor([[True, False, False], [False, True, False]])
    shares = torch.tensor([[0.1, 0.0, 0.3], [0.0, 0.0, 0.0]])  # a quarter and three quarters; nothing
    found = soft_log_likelihood(log_probs, is_target, shares, 0.4)
    expected = [0.6 * np.log(0.5) + 0.4 * (0.25 * np.log(0.5) + 0.75 * np.log(0.2)), np.log(0.4)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    plain = soft_log_likelihood(log_probs, is_target, shares, 0.0)
    assert torch.equal(plain, torch.where(is_target, log_probs, 0).sum(-1)), "to the bit"


def scored(model, told: torch.Tensor | None, alpha: float = 0.5, **options):
    """One answer, (0, 2, 1), behind a begin marker, by a head of written-down logits."""
    vocabulary = Vocabulary(SIZES, begin_id=12)
    answers = CodeAnswers(TRIE, vocabulary)
    # Two places: items 2 and 4, and items 3 and 0; a row that is no item ends the second.
    items = torch.tensor([[2, 4, 0], [3, 0, 0]], dtype=torch.int32)
    shares = torch.tensor([[0.6, 0.3, 0.1], [0.8, 0.2, 0.0]])
    install(model, answers, soft=SoftCodes(answers, items, shares, alpha))
    first = vocabulary.first_id
    ids = torch.tensor([[5, 12, first, first + 5, first + 8]])
    labels = torch.tensor([[-100, -100, *ids[0, 2:].tolist()]])
    extra = {} if told is None else {TEACHER_ROWS: told}
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, fused_lm_head=True, **extra)


@pytest.fixture
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = Vocabulary(SIZES, begin_id=12).size
    config = LlamaConfig(
        vocab_size=size, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def children(model) -> list[torch.Tensor]:
    """Log-softmax over the legal children at each level of the answer."""
    first = Vocabulary(SIZES, begin_id=12).first_id
    ids = torch.tensor([[5, 12, first, first + 5]])
    hidden = model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    logits = model.lm_head(hidden)[0].detach()
    legal = [[0, 1, 2], [3, 5], [7, 8]]
    return [logits[1 + level, [first + c for c in codes]].log_softmax(0) for level, codes in enumerate(legal)]


def test_an_answer_level_by_level(model) -> None:
    plain = model.forward
    first, second, third = children(model)
    out = scored(model, torch.tensor([[-1, -1, 0, 0, 0]]))
    expected = [
        0.5 * first[0] + 0.5 * (0.7 * first[0] + 0.3 * first[2]),  # items 2 and 0 have code 0, item 4 code 2
        0.5 * second[1] + 0.5 * (0.1 / 0.7 * second[0] + 0.6 / 0.7 * second[1]),
        third[1],  # 0.5 + 0.5: item 2 is all that the teacher has below (0, 2)
    ]
    torch.testing.assert_close(out.log_probs[0, 1:].detach(), torch.stack(expected), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.loss.detach(), -torch.stack(expected).sum() / 3, atol=1e-5, rtol=1e-5)
    model.forward = plain
    out = scored(model, torch.tensor([[-1, -1, 1, 1, 1]]))
    expected = [0.5 * first[0] + 0.5 * (0.8 * first[1] + 0.2 * first[0]), 0.5 * second[1] + 0.5 * second[0], third[1]]
    torch.testing.assert_close(out.log_probs[0, 1:].detach(), torch.stack(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("told", "alpha"), [([-1, -1, -1, -1, -1], 0.5), ([-1, -1, 0, 0, 0], 0.0), (None, 0.5)])
def test_without_a_teacher_it_is_the_plain_loss_to_the_bit(model, told, alpha) -> None:
    before = model.forward
    plain = scored(model, None)
    model.forward = before
    out = scored(model, None if told is None else torch.tensor([told]), alpha)
    for name in ("loss", "log_probs", "entropy", "is_top1", "label_mask"):
        assert torch.equal(getattr(out, name), getattr(plain, name)), name
    gradients = []
    for one in (plain, out):
        model.zero_grad()
        one.loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
