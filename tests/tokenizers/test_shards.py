"""Shards of vectors: who encodes which, and what a run that goes on finds."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from reasonrec.tokenizers import shards as module
from reasonrec.tokenizers.shards import Shards

TEXTS = [f"text {n}" for n in range(10)]


class Encoder:
    """Encodes by length and number; says what it was asked for."""

    def __init__(self, stop_at: str = "") -> None:
        self.asked: list[list[str]] = []
        self.stop_at = stop_at

    def __call__(self, texts: list[str]) -> np.ndarray:
        if self.stop_at in texts:
            raise KeyboardInterrupt
        self.asked.append(texts)
        return np.array([[len(text), int(text[5:])] for text in texts], dtype=np.float32)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD", 4)


def test_a_run_that_goes_on_encodes_what_is_missing(tmp_path: Path) -> None:
    folder, stopped = tmp_path / "index.resume", Encoder(stop_at="text 8")
    with pytest.raises(KeyboardInterrupt):
        Shards(folder, "model")(stopped)(TEXTS)
    assert stopped.asked == [TEXTS[:4], TEXTS[4:8]]
    (folder / "vectors-1-00001.safetensors").write_bytes(b"half of it")
    again = Encoder()
    vectors = Shards(folder, "model")(again)(TEXTS)
    assert again.asked == [TEXTS[4:8], TEXTS[8:]]
    assert np.array_equal(vectors, Encoder()(TEXTS))
    assert sorted(path.name for path in folder.iterdir()) == [
        "unfinished.json", *(f"vectors-1-0000{n}.safetensors" for n in range(3))
    ]  # fmt: skip


@pytest.mark.parametrize(("about", "texts"), [("another model", TEXTS), ("model", TEXTS[::-1])])
def test_what_was_made_of_something_else_is_made_again(about: str, texts: list[str], tmp_path: Path) -> None:
    Shards(tmp_path, "model")(Encoder())(TEXTS)
    encoder = Encoder()
    assert np.array_equal(Shards(tmp_path, about)(encoder)(texts), Encoder()(texts))
    assert len(encoder.asked) == 3


def test_processes_share_the_shards_of_every_list(tmp_path: Path) -> None:
    together = threading.Barrier(2, timeout=60)
    encoders, found = [Encoder(), Encoder()], {}

    def run(rank: int) -> None:
        encode = Shards(tmp_path / "new", "model", rank, 2, lambda: together.wait() and None)(encoders[rank])
        found[rank] = [encode(TEXTS), encode(TEXTS[:3])]

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert encoders[0].asked == [TEXTS[:4], TEXTS[8:], TEXTS[:3]]
    assert encoders[1].asked == [TEXTS[4:8]]
    for rank in range(2):
        assert np.array_equal(found[rank][0], Encoder()(TEXTS))
        assert np.array_equal(found[rank][1], Encoder()(TEXTS[:3]))
