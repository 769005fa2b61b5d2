"""Every key of a manifest, removed, mistyped or changed: noticed, and harmless where its author forged the hashes."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from reasonrec.data_gen.reasoning.traces import Traces
from reasonrec.data_gen.schema import Dataset
from reasonrec.recipes.recommender import Recommender
from reasonrec.tokenizers.artefact import read_manifest, write_json
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.index import ItemIndex
from reasonrec.tokenizers.manifest import Manifest
from reasonrec.tokenizers.output import MANIFEST

ODD: list[Any] = [None, True, -1, 1.5, 1e308, 2**70, "", "../../x", "\x00", [], ["x"], {}, {"x": 1}]
STAGES = ["prepare", "index_items", "synthesize", "sft"]
if os.environ.get("REASONREC_RELIABILITY") == "large":
    STAGES += ["eval_ranking"]
LOADERS: dict[str, Callable[[Path], object]] = {
    "prepare": Dataset.load,
    "index_items": ItemIndex.load,
    "synthesize": Traces.load,
    "sft": Recommender.from_pretrained,
}


def places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every key and element."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*here, key)
        yield from places(value[key], (*here, key))


def variants(whole: dict[str, Any], place: tuple[Any, ...]) -> Iterator[dict[str, Any]]:
    """The manifest without what stands at a place, and with other values there."""
    for odd in [*ODD, ...]:
        changed = copy.deepcopy(whole)
        holder: Any = changed
        for key in place[:-1]:
            holder = holder[key]
        before = holder[place[-1]]
        if odd is ...:
            del holder[place[-1]]
        elif odd == before and type(odd) is type(before):
            continue
        else:
            holder[place[-1]] = odd
        yield changed


@pytest.mark.parametrize("name", STAGES)
def test_every_key_is_sealed(
    name: str, made: Callable[[str], Path], tmp_path: Path, large: bool, report: Callable[[str, int, list[str]], None]
) -> None:
    shutil.copytree(made(name), folder := tmp_path / "copy")
    whole = json.loads((folder / MANIFEST).read_text())
    tries, faults = 0, []
    for place in list(places(whole))[:: 1 if large else 9]:
        for changed in variants(whole, place):
            (folder / MANIFEST).write_text(json.dumps(changed))
            tries += 1
            try:
                read_manifest(folder)
            except UserError as error:
                if "\n" in str(error):
                    faults.append(f"{place}: several lines")
            except Exception as error:
                faults.append(f"{place}: {error!r}")
            else:
                faults.append(f"{place}: not noticed")
    report(f"manifest keys of what {name} writes", tries, faults)


@pytest.mark.parametrize("name", LOADERS)
def test_forged_keys_do_no_harm(
    name: str, made: Callable[[str], Path], tmp_path: Path, large: bool, report: Callable[[str, int, list[str]], None]
) -> None:
    """Whoever writes a folder writes its hashes: it loads, or one line says why not."""
    original = made(name)
    folder = original.with_name("forged")  # beside it: the places of its inputs are relative
    shutil.copytree(original, folder)
    whole = json.loads((folder / MANIFEST).read_text())
    tries, faults = 0, []
    chosen = [
        place for place in places(whole) if place[0] in ("kind", "config", "inputs", "facts", "seed", "kit_version")
    ]
    for place in chosen[:: 1 if large else 40]:
        for changed in variants(whole, place):
            try:
                forged = Manifest(**changed)
                forged.hash_again()
            except (TypeError, AttributeError):
                continue  # no hash can be made of that
            write_json(folder / MANIFEST, forged.__dict__)
            tries += 1
            try:
                LOADERS[name](folder)
            except UserError as error:
                if "\n" in str(error):
                    faults.append(f"{place}: several lines")
            except Exception as error:
                faults.append(f"{place}: {error!r}")
    shutil.rmtree(folder)
    report(f"forged manifest keys of what {name} writes", tries, faults)
