"""A checkpoint with something added: the same weights in a folder of its own, which names the one it was made from."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reasonrec.data_gen.schema import Dataset
from reasonrec.recipes.keys import recorded
from reasonrec.recipes.models.checkpoint import base_of
from reasonrec.tokenizers.artefact import staged
from reasonrec.tokenizers.manifest import Manifest
from reasonrec.tokenizers.output import MANIFEST
from reasonrec.tokenizers.places import place


def about_amended(config: Any, start: Manifest, dataset: Dataset, out: Path, **inputs: str) -> dict[str, Any]:
    """What the manifest of an amended checkpoint says, for `adopt` and `amended`.

    Args:
        config: The stage's configuration, with `model`, `base_model` and `seed`.
        start: Manifest of the checkpoint.
        dataset: Its dataset.
        out: The new folder.
        **inputs: Hashes of what else it is made of.
    """
    kept = {"dataset": place(str(dataset.path), out)}
    if start.kind == "adapter":
        kept["base_model"] = place(config.base_model or base_of(start, config.model), out)
    before = {name: value for name, value in start.inputs.items() if name in ("dataset", "index")}
    return {
        "kind": start.kind,
        "config": recorded(config, out) | kept,
        "seed": config.seed,
        "inputs": before | {"model": start.hash} | inputs,
    }


@contextmanager
def amended(
    out: Path, model: str, start: Manifest, *, overwrite: bool, **about: Any
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The new folder with the checkpoint's files, and its facts; what is added to both is kept with them.

    Args:
        out: The new folder.
        model: Folder of the checkpoint.
        start: Its manifest.
        overwrite: Move an existing folder aside.
        **about: See `about_amended`.
    """
    with staged(out, overwrite=overwrite, **about) as (folder, facts):
        shutil.copytree(model, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST, "logs"))
        facts.update(start.facts)
        yield folder, facts
