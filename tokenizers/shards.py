"""Texts to vectors in shards: processes share them out, and what an interrupted run wrote is not computed again.

The texts are cut into shards of `SHARD`, however many processes there are. Each shard is encoded by itself and written
to a numbered file, whole or not at all. So the same texts share a batch in any number of processes, and the vectors
are the same bit for bit where all compute alike (the same processor, the same number of threads).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from reasonrec.tokenizers.artefact import write_tensors
from reasonrec.tokenizers.output import MARKER

SHARD = 4096  # texts
Encode = Callable[[list[str]], np.ndarray]


class Shards:
    """Where the shards of one run are, and which of them this process encodes.

    Args:
        folder: Where the files go; one that all processes see.
        about: What decides the vectors beside the texts; a file that was written under another one is replaced.
        rank: Number of this process.
        size: How many there are.
        wait: Returns when all processes have called it.
    """

    def __init__(
        self, folder: Path, about: str, rank: int = 0, size: int = 1, wait: Callable[[], None] = lambda: None
    ) -> None:
        self.folder, self.about, self.rank, self.size, self.wait = folder, about, rank, size, wait

    def __call__(self, encode: Encode) -> Encode:
        """Let all processes encode together; each of them gets all vectors.

        Args:
            encode: From texts to float32 (texts, dim); not called for shards that are there.

        Returns:
            The same function of all texts, which all processes have to call with the same lists in the same order.
        """
        called = 0

        def together(texts: list[str]) -> np.ndarray:
            nonlocal called
            called += 1
            parts = [texts[start : start + SHARD] for start in range(0, len(texts), SHARD)]
            files = [self.folder / f"vectors-{called}-{number:05}.safetensors" for number in range(len(parts))]
            names = [hashlib.sha256(json.dumps([self.about, part]).encode()).hexdigest() for part in parts]
            for number in range(self.rank, len(parts), self.size):
                if _read(files[number], names[number]) is None:
                    _write(files[number], names[number], encode(parts[number]))
            self.wait()
            vectors = []
            for file, name in zip(files, names, strict=True):
                if (part := _read(file, name)) is None:
                    raise FileNotFoundError(f"{file}: written by another process, and not there")
                vectors.append(part)
            return np.concatenate(vectors)

        return together


def _write(file: Path, name: str, vectors: np.ndarray) -> None:
    if not file.parent.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        (file.parent / MARKER).write_text("{}\n", encoding="utf-8")
    write_tensors(file, {"vectors": np.ascontiguousarray(vectors, dtype=np.float32)}, {"texts": name})


def _read(file: Path, name: str) -> np.ndarray | None:
    """The vectors of a file; None if it is not there, or of other texts."""
    try:
        with safe_open(file, framework="np") as stored:
            if (stored.metadata() or {}).get("texts") != name:
                return None
            vectors: np.ndarray = stored.get_tensor("vectors")
            return vectors
    except (OSError, SafetensorError):
        return None
