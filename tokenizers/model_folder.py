"""What the folder of somebody's model may name: nothing outside of it.

The libraries that load models obey more keys of a folder's JSON files than weights and shapes: a base model or a
tokenizer elsewhere, an attention kernel from the Hub, arguments of their own loaders. Code is theirs to refuse
(`trust_remote_code=False`), and so are pickles (`use_safetensors=True`); this is what is left.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from reasonrec.tokenizers.errors import UserError

ADAPTER_CONFIG = "adapter_config.json"
TRUST_REMEDY = "it brings code of its own; if you trust it, pass --trust_remote_code true (a keyword in Python)"
# Keys that lead elsewhere whatever they say, and keys that do where a path or a Hub id stands below them.
_ALWAYS = frozenset({"tokenizer_name_or_path", "transformers_weights"})
_BELOW = frozenset(
    {
        *("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"),
        *("model_args", "model_kwargs", "tokenizer_args", "processor_kwargs", "config_args", "config_kwargs"),
    }
)
_PICKLES = ("pytorch_model*.bin", "adapter_model.bin")


def check_links(folder: Path) -> None:
    """Check that no link in a folder leads out of it; in the Hub's cache all lead to `blobs` beside `snapshots`.

    Args:
        folder: The folder.

    Raises:
        UserError: If one does.
    """
    root = folder.resolve()
    homes = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    for path in sorted(folder.rglob("*")):
        if not path.is_symlink():
            continue
        try:
            inside = any(path.resolve().is_relative_to(home) for home in homes)
        except (OSError, RuntimeError):  # it leads to itself
            inside = False
        if not inside:
            raise UserError(f"{path} is a link out of {folder}: put the file itself there")


def check_model_folder(folder: Path) -> None:
    """Check that a model's folder leads to nothing outside of it.

    Args:
        folder: The folder, of an LLM or of a text encoder.

    Raises:
        UserError: If a link or a key of its JSON files does, if it is a PEFT adapter (which would load the base that
            it names), or if weights are there as a pickle only.
    """
    check_links(folder)
    for path in sorted(folder.rglob("*")):
        if path.name == ADAPTER_CONFIG:
            raise UserError(f"{path} makes {folder} an adapter of another model: give a model that stands by itself")
        if any(path.match(pattern) for pattern in _PICKLES) and not any(path.parent.glob("*.safetensors")):
            raise UserError(f"{path} is a pickle, which is never loaded: convert the weights to safetensors")
        if path.name.endswith(".safetensors.index.json"):
            files = _read(path).get("weight_map")
            for name in files.values() if isinstance(files, dict) else ():
                if not isinstance(name, str) or PurePosixPath(name).name != name or "\\" in name:
                    raise UserError(f"{path} names the weights {name!r}, which are not in {folder}: remove them")
        elif path.name == "config.json" or path.match("sentence_*_config.json"):
            for key, name in _elsewhere(_read(path)):
                raise UserError(f"{path} names {name!r} in {key}, which is not in {folder}: remove that key")


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): get the model again") from error
    return found if isinstance(found, dict) else {}


def _elsewhere(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Names of something outside, each with the key that leads there."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _elsewhere(part, name if name in _ALWAYS | _BELOW else key)
    elif isinstance(value, list):
        for part in value:
            yield from _elsewhere(part, key)
    elif isinstance(value, str) and (key in _ALWAYS or (key in _BELOW and ("/" in value or "\\" in value))):
        yield key, value
