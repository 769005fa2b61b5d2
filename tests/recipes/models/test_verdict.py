"""When thinking is offered, and that a verdict of others is only read, never believed to be well made."""

from __future__ import annotations

from dataclasses import replace

import pytest

from reasonrec.recipes.models.verdict import FACT, Verdict
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.manifest import Manifest

PAYS = Verdict(0.08, 0.02, 0.001, -0.004, 900, 1, 64, [1000, 1000], "0" * 64)


@pytest.mark.parametrize(
    ("gain_low", "ndcg_low", "offered"),
    [(0.02, -0.004, True), (0.0, 0.1, False), (-0.01, 0.1, False), (0.02, -0.005, False), (0.02, 0.0, True)],
)
def test_both_bounds_have_to_hold(gain_low: float, ndcg_low: float, offered: bool) -> None:
    verdict = replace(PAYS, gain_low=gain_low, ndcg_low=ndcg_low)
    assert verdict.offered is offered
    assert str(verdict).startswith(f"thinking {'pays' if offered else 'does not pay'} on 900 validation cases: +0.080")


def test_it_travels_in_a_manifest() -> None:
    manifest = Manifest("adapter", {}, 0, facts=PAYS.facts())
    assert Verdict.stored(manifest) == PAYS
    assert Verdict.stored(Manifest("adapter", {}, 0)) is None


@pytest.mark.parametrize("change", [{"gain": "much"}, {"cases": 1.5}, {"tokens": "many"}, {"direct": 7}, None])
def test_what_no_stage_wrote_is_refused(change: dict[str, object] | None) -> None:
    facts = PAYS.facts()
    if change is None:
        del facts[FACT]["ndcg_low"]
    else:
        facts[FACT].update(change)
    with pytest.raises(UserError, match="not what this kit writes: judge it again"):
        Verdict.stored(Manifest("adapter", {}, 0, facts=facts))
