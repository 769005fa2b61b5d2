"""Checking a reward ends, whatever its file does, and what the file wrote does no harm to a terminal."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from reasonrec.rewards.__main__ import main
from reasonrec.rewards.sandbox import Limits, check_apart
from reasonrec.tokenizers.errors import UserError

Check = Callable[..., tuple[int, str, str]]
HEAD = """import os, signal, sys, time
def write_everywhere(line):
    for place in range(3, 64):
        try:
            os.write(place, line)
        except OSError:
            pass
"""
GOOD = "return [float(p == t) for p, t in zip(predicted_codes, target_codes)]"
DEF = "def f(*, completions, predicted_codes, target_codes, **_):\n    "


@pytest.fixture(autouse=True)
def _few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reasonrec.rewards.check.SPEED_ROWS", 200)


@pytest.fixture
def check(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Check:
    """Status, output and errors of a check of a file that does something when it is imported and when it is called."""

    def run(imported: str, called: str, *words: str) -> tuple[int, str, str]:
        path = tmp_path / "mine.py"
        path.write_text(f"{HEAD}{imported}\n{DEF}{called}\n", encoding="utf-8")
        status = main(["check", f"{path}:f", *words])
        return status, *capfd.readouterr()

    return run


@pytest.mark.parametrize("statement", ["while True: pass", "time.sleep(1e6)"])
@pytest.mark.parametrize("when", ["imported", "called"])
def test_a_reward_that_hangs_is_found(check: Check, statement: str, when: str) -> None:
    words = (statement, GOOD) if when == "imported" else ("", f"{statement}\n    {GOOD}")
    status, output, errors = check(*words, "--time_limit", "2")
    assert status == 1
    assert re.search("violation: .*: no answer within 2 s: it hangs, or it needs a longer --time_limit", output)
    assert errors == ""


@pytest.mark.parametrize(
    ("statement", "why"),
    [
        ("os._exit(0)", "it ended its process with status 0"),
        ("os._exit(3)", "it ended its process with status 3"),
        ('print(\'{"error": ""}\', flush=True); os._exit(0)', "it ended its process with status 0"),
        ("write_everywhere(b'[]\\n')", "its process wrote what is no answer"),
        ('write_everywhere(b\'{"values": 1, "seconds": "x"}\\n[]\\n\')', "its process wrote what is no answer"),
        ("write_everywhere(b'[' * 100_000 + b'\\n')", "its process wrote what is no answer"),
        pytest.param(
            "os.kill(os.getpid(), signal.SIGSEGV)",
            "its process was ended by SIGSEGV",
            marks=pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signal"),
        ),
    ],
)
def test_a_reward_that_ends_its_process_is_found(check: Check, statement: str, why: str) -> None:
    for words, where in (((statement, GOOD), "loading it"), (("", f"{statement}\n    {GOOD}"), "reasoning mode")):
        status, output, errors = check(*words)
        assert status == 1
        assert re.search(f"violation: {where}.*: {re.escape(why)}", output)
        assert errors == ""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of memory holds on Linux")
def test_memory_is_limited(check: Check) -> None:
    hog = f"hog = numpy.empty(3 << 30, dtype='u1')  # asked for, never touched\n    {GOOD}"
    status, output, _ = check("import numpy", hog, "--memory_limit", "1")
    assert status == 1
    assert re.search("raised .*MemoryError", output)
    assert check("import numpy", hog)[0] == 0, "4 GiB by default"


def test_what_it_prints_and_reads_is_its_own_business(check: Check) -> None:
    status, output, errors = check(
        "print('{}')", f"print('{{}}'); sys.stderr.write('x'); assert sys.stdin.read() == ''\n    {GOOD}"
    )
    assert status == 0
    assert "it can be used" in output
    assert errors == ""


def test_what_an_exception_says_is_cut_and_escaped(check: Check) -> None:
    status, output, _ = check("", "raise ValueError('\\x1b[2J\\n' + 'x' * 100_000 + '\\u202e')")
    assert status == 1
    assert r"raised ValueError: \x1b[2J xxx" in output
    assert all(line.isprintable() and len(line) < 1300 for line in output.splitlines())
    status, output, errors = check("raise ValueError('\\x1b[2J\\n' + 'x' * 100_000)", GOOD)
    assert status == 2
    assert r"running" in errors
    assert r"ValueError: \x1b[2J xxx" in errors
    assert errors.strip().isprintable()
    assert len(errors) < 1300
    status, _, errors = check("sys.exit('no main guard')", GOOD)
    assert status == 2
    assert "failed with SystemExit: no main guard" in errors


@pytest.mark.parametrize("words", [("--time_limit", "0"), ("--time_limit", "nan"), ("--memory_limit", "inf")])
def test_limits_are_above_zero_and_finite(check: Check, words: tuple[str, str]) -> None:
    status, _, errors = check("", GOOD, *words)
    assert status == 2
    assert f"error: {words[0]} {words[1]} has to be above 0 and at most 1e+06" in errors


def test_options_reach_the_reward_and_its_mistakes_come_back() -> None:
    assert check_apart("length", {"longest": 10, "limit": 20, "shortest": 2}, Limits()).violations == []
    with pytest.raises(UserError, match="'length' has no option 'longst'; did you mean 'longest'"):
        check_apart("length", {"longst": 1}, Limits())
