"""Which numbers end a training, and what the user is told."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from reasonrec.recipes.trainers.algorithms import build_algorithm
from reasonrec.recipes.trainers.divergence import LARGEST, bad_number, bad_tensor, check_trained, diverged, from_all
from reasonrec.recipes.trainers.item_sft import save_weights
from reasonrec.rewards import calling
from reasonrec.rewards.registry import load_rewards
from reasonrec.tokenizers.errors import UserError


def test_the_error_names_step_value_and_what_to_lower():
    rates = {"learning_rate": 1e38, "row_learning_rate": None, "max_grad_norm": 1.0}
    assert str(diverged(12, "the loss is nan", rates)) == (
        "training diverged at step 12: the loss is nan; lower learning_rate=1e+38, or max_grad_norm=1"
    )
    rates |= {"row_learning_rate": 0.5, "max_grad_norm": 0.0}
    assert str(diverged(3, "x", rates, "precision=fp32")) == (
        "training diverged at step 3: x; lower learning_rate=1e+38 and row_learning_rate=0.5, or set max_grad_norm=1, "
        "or precision=fp32"
    )


def test_the_first_bad_number_is_named():
    assert bad_number({"loss": 0.0, "gradient norm": 1e300}) is None
    assert bad_number({"loss": float("-inf"), "gradient norm": float("nan")}) == "the loss is -inf"


@pytest.mark.parametrize(
    ("value", "shown"), [(float("nan"), "nan"), (float("inf"), "inf"), (float("-inf"), "-inf"), (-1e38, "-1e+38")]
)
def test_the_first_bad_tensor_is_named(value, shown):
    bad = torch.ones(2, 3)
    bad[1, 2] = value
    tensors = [("empty", torch.empty(0)), ("good", torch.full((2,), LARGEST)), ("bad", bad), ("worse", bad)]
    assert bad_tensor(tensors[:2]) is None
    assert bad_tensor(tensors) == f"the weights bad hold {shown}"


def test_only_what_trains_is_looked_at_and_nothing_bad_is_saved(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.fill_(float("nan"))
    model[0].requires_grad_(False)
    check_trained(model)
    model[0].requires_grad_(True)
    with pytest.raises(UserError, match=r"the weights 0\.weight hold nan, so nothing was saved; lower learning_rate"):
        save_weights(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [UserError("a mistake"), FloatingPointError("NaN")])
def test_an_error_of_one_process_comes_back(error):
    def fails():
        raise error

    with pytest.raises(type(error), match=str(error)):
        from_all(fails)
    assert from_all(lambda: 3) == [3]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rollouts_that_are_not_finite_end_reinforcement_learning(tiny_base, make_grpo, value):
    """A loss of zero is nothing special there, so it is the policy that tells."""
    trainer = make_grpo(tiny_base)
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight.fill_(value)
    with pytest.raises(UserError, match=r"training diverged at step 1: .*; lower learning_rate=0\.001, or max_grad"):
        trainer.train()


def test_reinforcement_learning_that_diverges_is_an_error(tiny_base, make_grpo):
    trainer = make_grpo(tiny_base, learning_rate=1e38, max_steps=6)
    with pytest.raises(UserError, match=r"training diverged at step [1-6]: the .*; lower learning_rate=1e\+38"):
        trainer.train()


@pytest.mark.parametrize("algorithm", ["grpo", "srpo"])
def test_rewards_too_large_for_an_advantage_are_an_error(algorithm):
    with pytest.raises(UserError, match=r"weight 1e\+300 .*: a weight is a finite number of at most 1e\+06 in size"):
        load_rewards({"exact": 1e300})
    largest = calling.LARGEST**2  # a reward times its weight: the group's deviation is still finite
    total, hits = np.array([largest, -largest, 0.0, 0.0]), np.array([True, False, False, False])
    found = build_algorithm(algorithm, {"bonus_k": 2} if algorithm == "srpo" else {}, 4)(total, hits)
    assert np.isfinite(found).all()
    assert found[0] > found[2] > found[1]
