"""A recommender to serve, and engines that are closed behind each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from reasonrec.recipes.recommender import Recommender
from reasonrec.recipes.serving.engine import Engine, EngineSettings


@pytest.fixture(scope="session")
def served(adapter: Path) -> Recommender:
    """The adapter that all tests of serving share."""
    return Recommender.from_pretrained(adapter, dtype="fp32", device="cpu")


@pytest.fixture
def engine_of(served: Recommender) -> Iterator[Callable[..., Engine]]:
    """A function that starts an engine with some settings."""
    engines: list[Engine] = []

    def start(**settings: Any) -> Engine:
        engines.append(Engine(served, EngineSettings(**settings)))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()
        assert not engine.alive
        assert engine.open == 0, "every slot is given back"
