"""Small by default; `REASONREC_RELIABILITY=large` (make bench BENCH=reliability) tries everything."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

LARGE = os.environ.get("REASONREC_RELIABILITY") == "large"


@pytest.fixture(scope="session")
def large() -> bool:
    """Whether everything is tried."""
    return LARGE


@pytest.fixture
def report(record_property: Callable[[str, object], None]) -> Callable[[str, int, list[str]], None]:
    """A function that takes an area's tries and faults down, and fails the test if there is a fault."""

    def take_down(area: str, tries: int, faults: list[str]) -> None:
        if folder := os.environ.get("REASONREC_RELIABILITY_OUT"):
            with Path(folder, "tries.jsonl").open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"area": area, "tries": tries, "faults": faults}) + "\n")
        assert tries > 0
        assert not faults, "\n".join(faults[:20])

    return take_down
