"""A changed byte anywhere in an artefact is noticed by whoever loads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from reasonrec.tokenizers.artefact import read_manifest
from reasonrec.tokenizers.errors import UserError


def test_a_changed_byte_anywhere_is_refused(
    tiny_dataset: Path, tiny_index: Path, large: bool, report: Callable[[str, int, list[str]], None]
) -> None:
    tries, faults = 0, []
    for folder in (tiny_dataset, tiny_index):
        for path in sorted(folder.iterdir()):
            right = path.read_bytes()
            places = 64 if large else 4
            for at in sorted({round(i * (len(right) - 1) / (places - 1)) for i in range(places)}):
                wrong = bytearray(right)
                wrong[at] ^= 1
                path.write_bytes(wrong)
                tries += 1
                try:
                    read_manifest(folder)
                except UserError:
                    continue
                finally:
                    path.write_bytes(right)
                if path.name != "manifest.json" or _meaning(bytes(wrong)) != _meaning(right):
                    faults.append(f"{path} at byte {at}")
    report("a changed byte", tries, faults)


def _meaning(text: bytes) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None
