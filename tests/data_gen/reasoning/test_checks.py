"""Planted leaks and other nonsense are caught, each for its own reason, and an honest reply is not."""

from __future__ import annotations

from collections import Counter

import numpy as np
import polars as pl
import pytest

from reasonrec.data_gen.reasoning.checks import Checker, contains
from reasonrec.data_gen.reasoning.label_statistics import Case, ItemLabels
from reasonrec.data_gen.reasoning.synthesis import Synthesis, _fit, _settle, easy_rows
from reasonrec.data_gen.reasoning.traces import CUES, Reply, Trace, mentions

ITEMS = pl.DataFrame(
    [
        (0, "The Oak Forest (1990)", "Drama, War", "Acme"),
        (1, "Steel Rain (1991)", "War", "Bolt"),
        (2, "Quiet Harbour (1992)", "Drama", "Acme"),
        (3, "Blue Comet Rising (1999)", "Sci-Fi, War", "Zenith"),  # the target
        (4, "Heat (1995)", "Crime", ""),
        (5, "It (1990)", "Horror", ""),
        (6, "The Long Road Home (1980)", "Drama", ""),
    ],
    schema=["item", "title", "category", "brand"],
    orient="row",
)
LABELS = ItemLabels.of(ITEMS, "category")
CHECKER = Checker(ITEMS, LABELS)
CASE = Case("train/0/3", 0, (0, 1, 2))
HONEST = {
    "evidence": "war stories [1][2], quiet ones [3]",
    "preference": "serious films",
    "intent": "War",
    "formulation": "War, Drama",
    "rewriting": "[1][2]",
}


def check(target: int = 3, guess: tuple[str, ...] = ("War", "Drama"), **changes: str) -> Trace | str:
    text = "\n".join(f"{CUES[stage]}: {body}" for stage, body in (HONEST | changes).items())
    return CHECKER.check(Reply(CASE.key, text), CASE, target, 0, 3, guess)


def test_an_honest_reply_becomes_a_trace():
    trace = check()
    assert isinstance(trace, Trace)
    assert trace.evidence == "war stories [0][1], quiet ones [2]"
    assert trace.rewriting == "[0][1]"
    assert trace.hit, "War is a label of the target"
    assert (trace.target, trace.guess, trace.history) == (3, ("War", "Drama"), (0, 1, 2))
    missed = check(formulation="Drama")
    assert isinstance(missed, Trace)
    assert missed.hit is False


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("not in five stages", {"rewriting": ""}),
        ("names an item outside the history", {"evidence": "war stories [4]"}),
        ("names an item outside the history", {"rewriting": "[0][1]"}),
        ("code in the text", {"preference": "things like <|a_3|><|b_1|>"}),
        ("title of the target", {"evidence": "leads to Blue Comet Rising (1999) [1]"}),
        ("title of the target", {"formulation": "BLUE comet rising, say"}),
        ("title of the target", {"intent": "a blue-comet rising film"}),
        ("brand of the target", {"preference": "zenith films"}),
        ("label of the target", {"formulation": "War, sci-fi"}),
        ("title outside the history", {"preference": "films such as the long road home"}),
        ("rewriting is no part of the history", {"rewriting": "[2][1]"}),
        ("rewriting is no part of the history", {"rewriting": "[1][1]"}),
        ("rewriting is no part of the history", {"rewriting": "the first two [1][2]"}),
        ("rewriting is no part of the history", {"rewriting": "both"}),
        ("rewriting keeps what the intent does not name", {"rewriting": "[1][3]"}),
    ],
)
def test_planted_faults_are_caught(reason, changes):
    assert check(**changes) == reason


def test_what_the_history_or_the_blind_guess_says_is_no_leak():
    assert isinstance(check(guess=("Sci-Fi",), formulation="Sci-Fi"), Trace)
    assert isinstance(check(preference="Steel Rain and the like"), Trace), "a title of the history"
    assert isinstance(check(target=2, preference="more of Acme, more Drama"), Trace)
    repeated = CHECKER.check(
        Reply(CASE.key, "\n".join(f"{CUES[s]}: {b}" for s, b in HONEST.items())), CASE, 1, 0, 3, ("War",)
    )
    assert isinstance(repeated, Trace), "the target stands in the history already"


def test_short_titles_are_words_unless_they_are_written_as_titles():
    assert isinstance(check(target=5, preference="it is serious"), Trace)
    assert check(target=5, preference="soon It") == "title of the target"
    assert check(target=4, preference="in the heat of it") == "title of the target", "in doubt, refused"


def test_words_are_compared_whole():
    assert contains("a warm drama", "Drama")
    assert not contains("a warm dramatic thing", "Drama")
    assert not contains("a warm day", "War")
    assert not contains("anything", "")


def trace_of(hit: bool | None, target: int = 0, rewriting: str = "[1]") -> Trace:
    return Trace("k", 0, 0, 0, (1, 2), target, "e", "p", "i", "f", rewriting, hit=hit)


@pytest.mark.parametrize(
    ("on_miss", "formulations", "count"),
    [
        ("strip", ["f", None, None], {"kept without the formulation": 2}),
        ("drop", ["f"], {"dropped": 2}),
        ("keep", ["f", "f", "f"], {}),
    ],
)
def test_misses_are_settled_and_counted(on_miss, formulations, count):
    misses: Counter[str] = Counter()
    settled = _settle([trace_of(True), trace_of(False), trace_of(None)], on_miss, None, misses)
    assert [trace.formulation for trace in settled] == formulations
    assert dict(misses) == count


def test_a_long_chain_keeps_fewer_items_before_it_is_refused():
    def length(trace: Trace) -> int:
        return 10 + len(mentions(trace.rewriting or ""))

    short = _fit(trace_of(True, rewriting="[4][5][6]"), length, 12)
    assert isinstance(short, Trace)
    assert (short.rewriting, short.tokens) == ("[5][6]", 12), "the newest stay"
    assert _fit(trace_of(True, rewriting="[4][5][6]"), length, 10) == "too long"


def test_the_bias_towards_easy_rows_by_hand():
    popularity = np.array([100, 1, 1, 1, 1])  # item 0 is the head
    groups = easy_rows([trace_of(True, 0), trace_of(True, 1), trace_of(False, 2), trace_of(None, 3)], popularity)
    assert groups["right"] == {"rows": 2, "head_share": 0.5, "median_target_count": 50.5, "mean_history": 2.0}
    assert groups["wrong"]["head_share"] == 0
    assert groups["all"]["rows"] == 3


def test_counts_add_up():
    result = Synthesis(cases=6, problems=Counter(refused=1), rejected=Counter({"too long": 2}))
    result.verified = [trace_of(True), trace_of(False), trace_of(None)]
    result.traces = list(_settle(result.verified, "drop", None, result.misses))
    counts = result.counts()
    lost = sum(counts["no_reply"].values()) + sum(counts["rejected"].values()) + counts["formulation"]["dropped"]
    assert counts["kept"] + lost == counts["cases"]
    assert counts["formulation"]["share"] == 0.5
    assert counts["stages"]["formulation"] == 1
