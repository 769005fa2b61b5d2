"""A stage that is killed, at any file operation of its finish or elsewhere, leaves nothing half and ends the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

KILL_AT = Path(__file__).with_name("kill_at.py")
STAGES = ["prepare", "index_items", "sft", "grpo"]
if os.environ.get("REASONREC_RELIABILITY") == "large":
    STAGES += ["synthesize", "eval_ranking"]


@pytest.mark.parametrize("name", STAGES)
def test_kills(
    name: str,
    flags_of: Callable[[str], list[str]],
    tmp_path: Path,
    large: bool,
    report: Callable[[str, int, list[str]], None],
) -> None:
    points, moments = ("0", "17") if large else ("2", str(int(name == "sft")))
    command = [sys.executable, str(KILL_AT), name, points, moments, str(tmp_path / "out"), *flags_of(name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["operations"], "the finish makes file operations"
    for area in ("kills in the finish", "kills at random moments"):
        if found[area]["tries"]:
            report(f"{area} of {name}", found[area]["tries"], found[area]["faults"])
