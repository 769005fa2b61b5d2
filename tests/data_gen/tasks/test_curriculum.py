"""A curriculum: one list of examples, in the order of its phases, the same whenever it is made."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonrec.data_gen.tasks.curriculum import Phase, _shared_out, make_curriculum, parse_phases, plot_plan
from reasonrec.data_gen.tasks.mixture import PlanConfig, make_plan
from reasonrec.data_gen.tasks.render import Material, task_names
from reasonrec.tokenizers.errors import UserError

LENGTHS = np.array([2, 3] * 4 + [2])
SEQREC, ITEM2INDEX, FUSION, EVIDENCE, REASON = (
    task_names().index(task) for task in ("seqrec", "item2index", "fusionseqrec", "evidence", "reason")
)


class FakeTraces:
    """Ten traces, of which only the even ones have evidence."""

    def eligible(self, task: str) -> np.ndarray:
        return np.arange(0, 10, 2 if task == "evidence" else 1)

    def lengths(self, task: str) -> np.ndarray:
        return np.full(10, 40)


def material(n: int = 40, *, set_order: bool = False) -> Material:
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 9, int(rng.integers(2, 12))) for _ in range(n)]
    return Material(sequences, LENGTHS, set_order, FakeTraces())  # type: ignore[arg-type]


def config(**changes) -> PlanConfig:
    base = {"tasks": {"seqrec": 1.0}, "max_history": 4, "one_per_prefix": False}
    return PlanConfig(**(base | {"passes": 2.0, "batch_size": 4, "seed": 0} | changes))


CURRICULUM = {
    "alignment": {"share": 3, "seqrec": 0.75, "item2index": 0.25},
    "evidence": {"share": 1, "evidence": 0.5, "seqrec": 0.5},
    "whole": {"share": 1, "reason": 1.0},
}
PHASES = parse_phases(CURRICULUM)


@pytest.mark.parametrize("set_order", [False, True])
@pytest.mark.parametrize("one_per_prefix", [False, True])
def test_it_is_a_pure_function_of_configuration_and_seed(set_order, one_per_prefix):
    options = {"one_per_prefix": one_per_prefix}
    plan = make_curriculum(config(**options), PHASES, material(set_order=set_order))
    np.random.seed(99)  # noqa: NPY002 - the global state must not matter
    assert make_curriculum(config(**options), PHASES, material(set_order=set_order)).equals(plan)
    other = make_curriculum(config(seed=1, **options), PHASES, material(set_order=set_order))
    assert not other.equals(plan)


def test_phases_come_in_their_order_with_their_shares_and_ratios():
    plan = make_curriculum(config(), PHASES, material())
    phase = plan["phase"].to_numpy()
    assert (np.diff(phase) >= 0).all()
    sizes = np.bincount(phase)
    np.testing.assert_allclose(sizes / plan.height, [0.6, 0.2, 0.2], atol=4 / plan.height)
    begins = np.searchsorted(phase, [1, 2])
    assert (begins % 4 == 0).all(), "a phase begins with a batch"
    tasks = [Counter(plan.filter(phase=p)["task"].to_list()) for p in range(3)]
    assert set(tasks[0]) == {SEQREC, ITEM2INDEX}
    assert tasks[0][ITEM2INDEX] == round(sizes[0] / 4)
    assert set(tasks[1]) == {SEQREC, EVIDENCE}
    assert set(tasks[2]) == {REASON}
    assert set(plan.filter(task=EVIDENCE)["source"]) == {0, 2, 4, 6, 8}


def test_it_has_as_many_examples_as_a_plan_without_phases_and_the_same_columns():
    stuff = material()
    plain = make_plan(config(passes=1.0), stuff)
    plan = make_curriculum(config(passes=1.0), PHASES, stuff)
    assert plan.height == plain.height
    assert plan.drop("phase").schema == plain.schema
    assert make_curriculum(config(passes=0.5), PHASES, stuff).height == round(plain.height / 2)


def test_a_task_goes_on_where_an_earlier_phase_left_it():
    """Ten rounds of phases share one pass: every interaction is shown once before any is shown twice."""
    phases = [Phase(str(i), 1, {"seqrec": 1.0}) for i in range(5)]
    stuff = material()
    plan = make_curriculum(config(passes=1.0), phases, stuff)
    shown = Counter(
        (source, place)
        for source, start, stop in plan.select("source", "start", "stop").iter_rows()
        for place in range(start, stop)
    )
    assert shown == {(s, p): 1 for s, items in enumerate(stuff.sequences) for p in range(len(items))}
    traces = make_curriculum(config(passes=0.2), [Phase("a", 1, {"reason": 1.0})], stuff)["source"].to_list()
    counts = Counter(traces)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert set(counts) == set(range(10))


def test_later_phases_do_not_change_earlier_ones():
    """The examples of the first phase are those of a curriculum that ends behind it."""
    whole = make_curriculum(config(), [Phase("a", 1, {"seqrec": 1.0}), Phase("b", 1, {"reason": 1.0})], material())
    head = make_curriculum(config(passes=1.0), [Phase("a", 1, {"seqrec": 1.0})], material())
    n = whole.filter(phase=0).height
    assert abs(n - head.height) < 4
    same = min(n, head.height) - 8
    first, second = (set(p.select("source", "start", "stop").rows()) for p in (whole[:n], head))
    assert len(first & second) > same


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 5), min_size=1, max_size=6).filter(lambda r: sum(r) > 0.1), st.integers(0, 300))
def test_ratios_are_shared_out_whole(ratios, total):
    counts = _shared_out({str(i): ratio for i, ratio in enumerate(ratios)}, total)
    assert sum(counts.values()) == total
    for count, ratio in zip(counts.values(), ratios, strict=True):
        assert abs(count - ratio / sum(ratios) * total) < 1


def test_batches_hold_examples_of_about_one_length():
    plan = make_curriculum(config(passes=4.0), PHASES, material())
    length = plan["length"].to_numpy()[: plan.height // 4 * 4].reshape(-1, 4)
    assert float(np.median(length.max(1) - length.min(1))) <= 4


def test_mistakes():
    with pytest.raises(UserError, match="phase a needs a share above 0"):
        parse_phases({"a": {"seqrec": 1}})
    with pytest.raises(UserError, match=r"phase a names 'evidens' \(did you mean 'evidence'\?\); known are seqrec"):
        parse_phases({"a": {"share": 1, "evidens": 1}})
    with pytest.raises(UserError, match=r"phase a=\{\}: weights must be at least 0"):
        parse_phases({"a": {"share": 1}})
    with pytest.raises(UserError, match="there is no phase"):
        parse_phases({})
    with pytest.raises(UserError, match=r"phase b gets none of the \d+ examples in batches of 4"):
        make_curriculum(config(), [Phase("a", 1000, {"seqrec": 1}), Phase("b", 1, {"seqrec": 1})], material())
    stuff = material()
    bare = Material(stuff.sequences, LENGTHS)
    with pytest.raises(UserError, match="the task evidence is made of reasoning traces: set traces"):
        make_curriculum(config(), PHASES, bare)


def test_the_plot_shows_every_task_and_phase(tmp_path):
    plan = make_curriculum(config(), PHASES, material())
    plot_plan(plan, PHASES, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    named = [replace(phase, name=f"$\\x {phase.name}$ \x1b") for phase in PHASES]
    plot_plan(plan[:3], named, tmp_path / "short.png")
