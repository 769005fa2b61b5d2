"""Two processes that write one output: one artefact stands, whole, and the other process says why it did not."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from reasonrec.recipes import prepare
from reasonrec.tokenizers.artefact import read_manifest
from reasonrec.tokenizers.errors import UserError

WORLD = ["--source", "synthetic", "--train_users", "60", "--held_out_users", "20"]


def test_two_processes_on_one_output(
    tmp_path: Path, large: bool, report: Callable[[str, int, list[str]], None]
) -> None:
    faults: list[str] = []
    offsets = [i / 10 for i in range(30 if large else 3)]
    for number, offset in enumerate(offsets):
        out = tmp_path / f"out{number}"
        commands = [
            [sys.executable, prepare.__file__, *WORLD, "--seed", str(s), "--output_dir", str(out)] for s in (1, 2)
        ]
        both = []
        for command in commands:
            both.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
            time.sleep(offset if len(both) == 1 else 0)
        errors = [process.communicate()[1] for process in both]
        codes = sorted(process.returncode for process in both)
        refused = [error for error in errors if "is being written by process" in error or "exists already" in error]
        if codes != [0, 2] or len(refused) != 1:
            faults.append(f"offset {offset}: {codes} {errors}")
        try:
            read_manifest(out, "dataset")
        except UserError as error:
            faults.append(f"offset {offset}: {error}")
        left = sorted(path.name for path in tmp_path.glob(f"{out.name}*"))
        if left != [out.name]:
            faults.append(f"offset {offset}: {left} stay")
    report("two processes on one output", len(offsets), faults)
