"""A changed byte anywhere in an artefact is noticed by whoever loads it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from reasonrec.tokenizers.artefact import read_manifest
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.manifest import is_content
from reasonrec.tokenizers.output import MANIFEST

STAGES = ["prepare", "index_items", "synthesize", "sft"]
if os.environ.get("REASONREC_RELIABILITY") == "large":
    STAGES += ["eval_ranking"]


@pytest.mark.parametrize("name", STAGES)
def test_a_changed_byte_anywhere_is_refused(
    name: str, made: Callable[[str], Path], tmp_path: Path, large: bool, report: Callable[[str, int, list[str]], None]
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(made(name), folder)
    tries, faults = 0, []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if path.name != MANIFEST and not is_content(path.relative_to(folder)):
            continue  # what only people look at
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
            if path.name != MANIFEST or _meaning(bytes(wrong)) != _meaning(right):
                faults.append(f"{path} at byte {at}")
    report(f"a changed byte in what {name} writes", tries, faults)


def _meaning(text: bytes) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None
