"""The command that goes on from what a stage has written, which its last line names."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.output import MANIFEST
from reasonrec.tokenizers.places import located
from reasonrec.tokenizers.yaml_files import read_yaml

_LAUNCH = "# accelerate launch recipes/"  # the first line of every configuration
_INPUTS = ("dataset", "index", "traces", "model", "models")  # keys that name what another stage wrote
# Where no configuration goes on: what to do with an artefact of each kind.
_BY_KIND = {
    "dataset": "reasonrec index --dataset {out} --output_dir {beside}/index",
    "index": "reasonrec sft --dataset {dataset} --index {out} --model HuggingFaceTB/SmolLM2-135M-Instruct "
    "--output_dir {beside}/sft",
    "adapter": "reasonrec serve --model {out}",
    "model": "reasonrec serve --model {out}",
}


def next_commands(out: Path, argv: Sequence[str]) -> list[str]:
    """What takes an artefact as its input.

    Args:
        out: The folder that was written.
        argv: The words behind the stage that wrote it; beside its `--config` lie the other stages of a recipe.

    Returns:
        Commands of the recipe that read `out`, whose other inputs are there and whose output is not, by their names;
        else one that fits the kind of artefact; none behind a report.
    """
    config = next((file for flag, file in pairwise(argv) if flag == "--config"), None)
    found = [] if config is None else _of_recipe(out, Path(config).parent)
    manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    if found or (general := _BY_KIND.get(manifest["kind"])) is None:
        return found
    dataset = os.path.relpath(located(manifest["config"].get("dataset") or ".", out))
    places = {"out": out, "beside": out.parent, "dataset": dataset}
    return [general.format(**{name: shlex.quote(str(path)) for name, path in places.items()})]


def _of_recipe(out: Path, folder: Path) -> list[str]:
    stages: list[tuple[str, dict[str, Any]]] = []
    for file in sorted(folder.glob("*.yaml")):
        with contextlib.suppress(UserError, OSError, UnicodeDecodeError):  # somebody's notes beside our files
            launch = file.read_text(encoding="utf-8").partition("\n")[0]
            if launch.startswith(_LAUNCH):
                stages.append((launch.removeprefix("# "), read_yaml(file)))
    outputs = {Path(str(stage.get("output_dir"))) for _, stage in stages}
    ready = []
    for launch, stage in stages:
        named = [stage[key] for key in _INPUTS if key in stage]
        inputs = {Path(str(path)) for value in named for path in (value if isinstance(value, list) else [value])}
        waits = any(not path.exists() for path in inputs & outputs)
        if out in inputs and not waits and not Path(str(stage.get("output_dir"))).exists():
            ready.append(launch)
    return ready
