"""Which codes a data set gets: those of text, unless validation says otherwise beyond doubt."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest

from reasonrec.recipes.indexing.collaboration import KS, Made, embeddings_for
from reasonrec.tokenizers.quantizers.base import build_quantizer

GROUP = np.repeat(np.arange(6), 8)


class World:
    """Users stay in one of six groups of items; text knows the groups, or nothing."""

    def __init__(self, *, text_knows: bool, valid: bool = True) -> None:
        rng = np.random.default_rng(0)
        sequences = [rng.choice(np.flatnonzero(rng.integers(6) == GROUP), 8) for _ in range(240)]
        self.train = pl.DataFrame(
            {"user": range(240), "items": [s[:-1].tolist() for s in sequences], "first_target": [0] * 240},
            schema={"user": pl.Int32, "items": pl.List(pl.Int32), "first_target": pl.Int32},
        )
        self.valid = pl.DataFrame(
            {"user": range(240), "history": [s[:-1].tolist() for s in sequences],
             "target": [int(s[-1]) for s in sequences], "masked": [[]] * 240},
            schema={"user": pl.Int32, "history": pl.List(pl.Int32), "target": pl.Int32, "masked": pl.List(pl.Int32)},
        )  # fmt: skip
        self.valid = self.valid if valid else self.valid.clear()
        counts = np.bincount(np.concatenate([s[:-1] for s in sequences]), minlength=48)
        self.items = pl.DataFrame({"train_count": counts})
        self.n_items, self.facts = 48, {"order": "sequence", "mask_history": False}
        known = np.eye(6)[GROUP] if text_knows else np.zeros((48, 6))
        text = np.concatenate([known, 0.05 * rng.standard_normal((48, 6))], 1).astype(np.float32)
        self.text = text / np.linalg.norm(text, axis=1, keepdims=True)

    def rows(self, split: str) -> pl.DataFrame:
        return self.valid


QUANTIZER = build_quantizer("balanced", [6, 8], 0, {})


def asked(world: Any, collaboration: Any) -> Made:
    return embeddings_for(world, world.text, collaboration, QUANTIZER, [6, 8])


def test_company_is_chosen_where_text_knows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    world = World(text_knows=False)
    vectors, report, says = asked(world, "auto")
    assert says is not None
    assert report["chosen"] in KS
    assert f"collaboration: auto chose k = {report['chosen']:g}" in capsys.readouterr().out
    text, *others = report["tried"]
    best = min(others, key=lambda one: one["loss"])
    assert best["ci95"][1] < 0
    assert best["difference"] == pytest.approx(best["loss"] - text["loss"])
    assert best["permuted_loss"] > best["loss"] + 0.3, "it is company, not skew"
    first = QUANTIZER.fit_encode(vectors)[:, 0]
    assert all(len(set(first[group == GROUP])) == 1 for group in range(6))


def test_text_stays_where_it_knows_as_much() -> None:
    world = World(text_knows=True)
    vectors, report, says = asked(world, "auto")
    assert says is None
    assert report["chosen"] == 0
    assert vectors is world.text
    assert len(report["tried"]) == 1 + len(KS)


def test_without_validation_text_stays_and_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    world = World(text_knows=False, valid=False)
    assert asked(world, "auto")[0] is world.text
    assert "has no validation rows" in capsys.readouterr().out


def test_what_is_told_is_done() -> None:
    world = World(text_knows=False)
    assert asked(world, 0)[0] is world.text
    vectors, report, says = asked(world, 2.0)
    assert says is not None
    assert says(world.text).shape == vectors.shape  # what an item gets that nobody had yet
    assert report == {"chosen": 2.0}
    assert not np.allclose(vectors[:, :6], world.text[:, :6])
