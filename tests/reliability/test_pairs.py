"""Two processes that write one output: one artefact stands, whole, and the other process says why it did not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from reasonrec.tokenizers.artefact import read_manifest
from reasonrec.tokenizers.errors import UserError

RECIPES = Path(__file__).parents[2] / "recipes"
STAGES = ["prepare"]
if os.environ.get("REASONREC_RELIABILITY") == "large":
    STAGES += ["index_items", "sft"]


@pytest.mark.parametrize("name", STAGES)
def test_two_processes_on_one_output(
    name: str,
    flags_of: Callable[[str], list[str]],
    tmp_path: Path,
    large: bool,
    report: Callable[[str, int, list[str]], None],
) -> None:
    command = [sys.executable, str(RECIPES / f"{name}.py"), *flags_of(name)]

    def begin(out: Path, seed: int) -> subprocess.Popen[str]:
        words = [*command, "--seed", str(seed), "--output_dir", str(out)]
        return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    began = time.monotonic()
    assert begin(tmp_path / "alone", 1).wait() == 0
    took = time.monotonic() - began
    faults: list[str] = []
    tries = 30 if large else 2
    for number in range(tries):
        offset, out = took * number / tries, tmp_path / f"out{number}"
        first = begin(out, 1)
        time.sleep(offset)
        both = [first, begin(out, 2)]
        errors = [process.communicate()[1] for process in both]
        codes = sorted(process.returncode for process in both)
        refused = [error for error in errors if "is being written by process" in error or "exists already" in error]
        if codes != [0, 2] or len(refused) != 1:
            faults.append(f"offset {offset}: {codes} {errors}")
        try:
            read_manifest(out)
        except UserError as error:
            faults.append(f"offset {offset}: {error}")
        left = sorted(path.name for path in tmp_path.glob(f"{out.name}*") if path.name.startswith(f"{out.name}."))
        if left or not out.is_dir():
            faults.append(f"offset {offset}: {left} stay")
    report(f"two processes of {name} on one output", tries, faults)
