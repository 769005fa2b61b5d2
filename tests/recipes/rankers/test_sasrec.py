"""SASRec: learns a chain, obeys masks, repeats itself bit for bit."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from reasonrec.recipes.rankers import sasrec
from reasonrec.recipes.rankers.baselines import Popularity, TrainLog
from reasonrec.recipes.rankers.sasrec import SasrecConfig
from reasonrec.rewards.metrics import flatten, per_row, valid_ratio
from reasonrec.tokenizers.errors import UserError

N_ITEMS = 40
SMALL = SasrecConfig(
    hidden=16, layers=1, heads=1, dropout=0.0, learning_rate=0.02, batch_size=16, epochs=12, max_length=8
)


def small(epochs: int, **changes: Any) -> SasrecConfig:
    return replace(SMALL, epochs=epochs, **changes)


def _rows(histories: list[list[int]], targets: list[int], masked: list[list[int]]) -> pl.DataFrame:
    return pl.DataFrame(
        {"history": histories, "target": targets, "masked": masked},
        schema={"history": pl.List(pl.Int32), "target": pl.Int32, "masked": pl.List(pl.Int32)},
    )


def _dataset(order: str = "sequence", n: int = 120) -> Any:
    """Items follow a fixed permutation: item x is followed by 7x + 3 (modulo 40)."""
    rng = np.random.default_rng(0)
    chains = []
    for start in rng.integers(N_ITEMS, size=n):
        chain = [int(start)]
        for _ in range(int(rng.integers(3, 12))):
            chain.append((7 * chain[-1] + 3) % N_ITEMS)
        chains.append(chain)
    train = pl.DataFrame(
        {"user": range(n), "items": chains, "first_target": [0] * n},
        schema={"user": pl.Int32, "items": pl.List(pl.Int32), "first_target": pl.Int32},
    )
    count = np.bincount(np.concatenate(chains), minlength=N_ITEMS)
    items = pl.DataFrame({"train_count": count}, schema={"train_count": pl.Int32})
    last = [int(item) for item in rng.integers(N_ITEMS, size=60)]
    rows = _rows([[item] for item in last], [(7 * item + 3) % N_ITEMS for item in last], [[item] for item in last])
    return SimpleNamespace(train=train, items=items, n_items=N_ITEMS, facts={"order": order}, rows=lambda _: rows)


def test_learns_a_chain_that_popularity_cannot() -> None:
    data = _dataset()
    rows = data.rows("test")
    model = sasrec.fit(data, SMALL, progress=False)
    popularity = Popularity(TrainLog.of(data)).rank(rows, 10)
    target = rows["target"].to_numpy()
    assert per_row(popularity, target)["hr@10"].mean() < 0.5
    assert per_row(model.rank(rows, 20), target)["hr@1"].mean() > 0.9
    assert model.best["hr@10"] == max(epoch["hr@10"] for epoch in model.curve)


def test_masked_items_never_appear_and_short_histories_work() -> None:
    model = sasrec.fit(_dataset(), small(1), progress=False)
    rows = _rows([[3, 4], [], list(range(30))], [1, 2, 3], [[5, 6, 7], list(range(1, 40)), []])
    ranking = model.rank(rows, 20)
    assert valid_ratio(ranking, N_ITEMS, rows["masked"]) == 1.0
    assert ranking[1].tolist() == [0] + [-1] * 19
    assert (ranking[2] >= 0).all()


def test_same_seed_same_weights_and_the_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    config = small(2, dropout=0.3)
    first, second = (sasrec.fit(_dataset("set"), config, progress=False) for _ in range(2))
    other = sasrec.fit(_dataset("set"), small(2, dropout=0.3, seed=1), progress=False)
    assert torch.equal(before, torch.random.get_rng_state())
    weights = [model.network.state_dict() for model in (first, second, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["items.weight"], weights[2]["items.weight"])
    assert first.curve == second.curve


def test_scores_do_not_depend_on_the_batch() -> None:
    model = sasrec.fit(_dataset(), small(1), progress=False)
    rows = _rows([[1], [2, 3, 4], [5, 6], [7] * 12], [0] * 4, [[]] * 4)
    together = model.scores(rows)
    alone = np.concatenate([model.scores(rows[i : i + 1]) for i in range(4)])
    assert np.allclose(together, alone, atol=1e-5)
    assert (model.rank(rows, 5) == np.concatenate([model.rank(rows[i : i + 1], 5) for i in range(4)])).all()


def test_windows_make_every_item_a_target_once() -> None:
    data = _dataset(n=1)
    data.train = pl.DataFrame(
        {"user": [0, 1, 2], "items": [list(range(20)), [30], [31, 32, 33]], "first_target": [0, 0, 2]},
        schema={"user": pl.Int32, "items": pl.List(pl.Int32), "first_target": pl.Int32},
    )
    pairs = []
    for inputs, targets in sasrec._batches(data, SMALL, np.random.default_rng(0)):
        assert inputs.shape == targets.shape
        assert inputs.shape[1] <= SMALL.max_length
        counted = targets >= 0
        pairs += list(zip(inputs[counted].tolist(), targets[counted].tolist(), strict=True))
    assert sorted(pairs) == [*((i, i + 1) for i in range(19)), (32, 33)]  # 31 → 32 is before the first target


def test_baskets_are_shuffled_within_themselves() -> None:
    data = _dataset("set")
    rng = np.random.default_rng(0)
    seen = [
        sorted(targets[targets >= 0].tolist()) for _ in range(2) for _, targets in sasrec._batches(data, SMALL, rng)
    ]
    assert sum(len(one) for one in seen) == 2 * sum(len(items) - 1 for items in data.train["items"].to_list())
    lengths = flatten(data.train["items"])[2]
    assert lengths.sum() - len(lengths) == sum(len(one) for one in seen) / 2


def test_trials_are_distinct_and_the_best_on_validation_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[SasrecConfig] = []

    def fake(_: Any, config: SasrecConfig, **__: Any) -> Any:
        tried.append(config)
        quality = {"epoch": 1, "ndcg@10": config.dropout, "hr@10": 0.0}
        return SimpleNamespace(best=quality, seconds=1.0, config=config)

    monkeypatch.setattr(sasrec, "fit", fake)
    best, records = sasrec.tune(_dataset(), trials=6, progress=False)
    assert len(set(tried)) == len(records) == 6
    assert tried[0] == SasrecConfig()
    assert best.config.dropout == max(config.dropout for config in tried)
    with pytest.raises(UserError, match="trials=0"):
        sasrec.tune(_dataset(), trials=0)


def test_bad_input_is_refused() -> None:
    with pytest.raises(UserError, match="multiple of heads"):
        SasrecConfig(hidden=10, heads=4)
    data = _dataset()
    data.train = data.train.with_columns(pl.col("items").list.head(1))
    with pytest.raises(UserError, match="two items"):
        sasrec.fit(data, SMALL, progress=False)


@pytest.mark.parametrize(
    ("rate", "batch", "what"),
    [
        (1e37, 16, "the (loss|gradient norm) is"),
        (1e37, 500, "the weights .* hold"),
        (1e38, 500, "the optimiser's step"),
    ],
)
def test_a_training_that_diverges_is_an_error(rate: float, batch: int, what: str) -> None:
    """In the losses; where an epoch has one step only, in the weights that it left; or in the step itself."""
    with pytest.raises(UserError, match=rf"training diverged at step \d+: SASRec: {what}.*; lower learning_rate="):
        sasrec.fit(_dataset(), small(3, learning_rate=rate, batch_size=batch), progress=False)
