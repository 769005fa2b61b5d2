"""`python -m reasonrec.rewards` finds what is wrong with a reward."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from reasonrec.rewards.__main__ import main
from reasonrec.rewards.calling import Reward
from reasonrec.rewards.cases import GOLDEN, cases, make_batch
from reasonrec.rewards.check import Finding, answer
from reasonrec.rewards.check import check as check_by
from reasonrec.rewards.registry import load_reward, names

Check = Callable[..., tuple[int, str]]


def check_reward(reward: Reward, clock: Callable[[], float] = time.perf_counter) -> Finding:
    """What is found of a reward in this process, which the command line gives a process of its own."""
    return check_by(lambda question: answer(reward, question, clock))


@pytest.fixture(autouse=True)
def _few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reasonrec.rewards.check.SPEED_ROWS", 200)


@pytest.fixture
def check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    def run(body: str, *words: str) -> tuple[int, str]:
        path = tmp_path / "mine.py"
        path.write_text(
            f"import random\nseen = []\ndef f(*, completions, predicted_codes, target_codes, **_):\n    {body}\n"
        )
        status = main(["check", f"{path}:f", *words])
        return status, capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", sorted(names()))
def test_the_kits_rewards_pass(name: str) -> None:
    found = check_reward(load_reward(name))
    assert found.violations == []
    assert found.warnings == []
    assert set(found.values) == {"reasoning", "direct"}


@pytest.mark.parametrize("name", ["exact", "prefix", "rsvr", "collaborative", "set_overlap"])
def test_the_known_holes_are_closed(name: str) -> None:
    """No cheat gets credit: the answer first, codes outside the catalogue, a disambiguation code less or more."""
    cheats = {
        "answer before think", "codes outside the catalogue", "missing disambiguation code",
        "extra disambiguation code", "two items behind one marker", "unfinished codes",
        "the target's codes without a begin marker",
    }  # fmt: skip
    values = {case.name: value for case, value in check_reward(load_reward(name)).values["reasoning"]}
    assert {values[cheat] for cheat in cheats} == {0.0}
    assert values[GOLDEN] == 1.0
    assert 0 <= values["right levels, wrong disambiguation code"] < 1  # type: ignore[operator]


def test_the_cases_are_what_they_say() -> None:
    for reasoning in (True, False):
        chosen = cases(reasoning)
        batch = make_batch(chosen, reasoning)
        for row, case in enumerate(chosen):
            if case.kind == "golden":
                assert batch["predicted_codes"][row] == batch["target_codes"][row]
            elif case.kind == "miss":
                assert batch["predicted_codes"][row] not in (None, batch["target_codes"][row])
            elif case.kind == "malformed":
                assert batch["predicted_codes"][row] is None
        assert len({case.name for case in chosen}) == len(chosen)
    assert make_batch([], True)["completions"] == []


@pytest.mark.parametrize(("k", "width"), [(3, 3), (12, 12), (50, 12)])
def test_a_list_is_as_long_as_the_reward_asks(k: int, width: int, tmp_path: Path) -> None:
    """Of twelve items at most, as a training's is no longer than its catalogue."""
    (tmp_path / "wide.py").write_text(
        f"def wide(*, beam_items, target_items, k={k}, **_):\n"
        f"    assert all(len(beam) == {width} for beam in beam_items)\n"
        "    return [float(beam[0] == item) for beam, item in zip(beam_items, target_items)]\n"
    )
    found = check_reward(load_reward(f"{tmp_path / 'wide.py'}:wide"))
    assert not [violation for violation in found.violations if "raised" in violation]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [random.random() for _ in completions]", "differently the second time"),
        ("return [float(len(seen)) for _ in completions if not seen.append(1)]", "differently the second time"),
        ("return [float(i) for i, _ in enumerate(completions)]", "change with the order"),
        ("return [float(len(set(completions)))] * len(completions)", "in a batch and .* alone"),
        ("return [float(completions.count(c)) for c in completions]", "in a batch and .* alone"),
        ("completions.sort(); return [1.0] * len(completions)", "changes its arguments"),
        ("return [float(p[0]) for p in predicted_codes]", "TypeError.*on the completion"),
        ("return [1.0 / len(c) for c in completions]", "ZeroDivisionError.*on the completion ''"),
        ("return [0.5]", "1 values for"),
        ("return [float('nan')] * len(completions)", "nan for the completion"),
        ("return ['good'] * len(completions)", "str"),
        ("return [p == t for p, t in zip(predicted_codes, target_codes)]", "bool"),
        ("return [None] * len(completions)", "None for everything"),
        ("return [2.0] * len(completions)", "every completion gets 2, a malformed one as an exact hit"),
        ("return [0.0] * len(completions)", "every completion gets 0, a malformed one as an exact hit"),
        ("return [float(p is None) for p in predicted_codes]", "'no answer' gets 1, an exact hit 0: it pays for"),
        (
            "return [float(p in (None, t)) for p, t in zip(predicted_codes, target_codes)]",
            "the malformed 'no answer' gets 1, an exact hit 1",
        ),
        ("return [1.0 if p is None else None for p in predicted_codes]", "'no answer' gets 1, an exact hit 0"),
        ("return [-float(p in (None, t)) for p, t in zip(predicted_codes, target_codes)]", "gets -1, an exact hit -1"),
        ("return [1e300] * len(completions)", r"1e\+300 for the completion .* at most 1e\+06 in size"),
        ("return [float('inf')] * len(completions)", r"inf for the completion .* at most 1e\+06 in size"),
        ("return [10**400] * len(completions)", r"inf for the completion .* at most 1e\+06 in size"),
        ("raise SystemExit(0)", "raised SystemExit: 0 on the completion"),
        ("raise KeyboardInterrupt", "it raised KeyboardInterrupt"),
    ],
)
def test_violations(body: str, message: str, check: Check) -> None:
    status, output = check(body)
    assert status == 1
    assert re.search(f"violation: .*{message}", output), output
    assert output.endswith("it cannot be used as it is\n")


def test_warnings(check: Check) -> None:
    misses = "return [float(p is not None and p != t) for p, t in zip(predicted_codes, target_codes)]"
    status, output = check(misses)
    assert status == 0
    assert "an exact hit 0: alone, or with a large weight" in output
    assert check(misses, "--strict")[0] == 1
    status, output = check("return [1.0 if p == t else None for p, t in zip(predicted_codes, target_codes)]")
    assert status == 0
    assert "every completion that gets anything gets 1" in output
    status, output = check(
        "return [float(p == t) + 0 * max(map(len, completions)) for p, t in zip(predicted_codes, target_codes)]"
    )
    assert status == 0
    assert "an exact hit scores highest" in output
    status, output = check(
        "n = 0.0 * max(map(len, completions)); return [n + (p == t) for p, t in zip(predicted_codes, target_codes)]"
    )
    assert status == 0
    assert "a batch without completions: " in output


def test_a_slow_reward_is_noted() -> None:
    now = iter(range(0, 100, 5))
    found = check_reward(load_reward("exact"), clock=lambda: float(next(now)))
    assert any("slow" in warning for warning in found.warnings)


def test_list_and_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    output = capsys.readouterr().out
    assert all(name in output for name in (*names(), "beam_items", "predicted_codes"))
    assert main(["check", "rsvrr"]) == 2
    assert "did you mean 'rsvr'" in capsys.readouterr().err
    assert main(["check", "length", "--options", "{longest: 10, limit: 20, shortest: 2}"]) == 0
    assert main(["check", "length", "--options", "{longest: 10, limit: 5}"]) == 1
    assert main(["check", "length", "--options", "[1]"]) == 2
    assert main(["check", "length", "--options", "{"]) == 2
    assert main(["check", "length", "--options", "{wide: 1}"]) == 2
    capsys.readouterr()
    for options in ("{a: !!timestamp x\x1b}", "[" * 5000, "a: " + "9" * 5000, "{a: 1, a: 2}"):
        assert main(["check", "length", "--options", options]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: --options ")
        assert "not valid YAML" in error
        assert error.removesuffix("\n").isprintable()
