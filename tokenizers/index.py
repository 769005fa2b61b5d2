"""The item index: every item as a short tuple of codes, unique and prefix-free.

An item has `depth` codebook codes. Items that share all of them get one more, the disambiguation code: their
rank inside the group, counted from 0 in item order. *Every* member of such a group gets one and nobody else
does (GREAM's rule), so no item's tuple is the beginning of another's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from reasonrec.tokenizers.artefact import check_input, read_manifest
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.manifest import Manifest
from reasonrec.tokenizers.quantizers.base import Quantizer, build_quantizer, codewords
from reasonrec.tokenizers.said import Said

INDEX_FILE = "index.safetensors"
QUANTIZER_FILE = "quantizer.safetensors"
MADE_BY = "made_by"  # the fact of a catalogue that grew: the configuration of the index that it began as
EMBEDDINGS_FILE = "embeddings.safetensors"
ADDED_FILE = "added.safetensors"  # embeddings of the items that a catalogue has behind those of its index
REMEDY = "run recipes/index_items.py on this dataset again (with --overwrite)"
_AGAIN = "index the items again"
_TOKEN = re.compile(r"<\|?([a-z]+)_(\d+)\|?>")


@dataclass(frozen=True)
class ItemIndex:
    """The codes of all items.

    Example:
        >>> index = build_index(np.array([[3, 1], [0, 2], [3, 1]]), [4, 4])
        >>> index.tuples()
        [(3, 1, 0), (0, 2), (3, 1, 1)]

    Attributes:
        codes: int32 (items, depth + 1); the last column is the disambiguation code, -1 where none is needed.
        level_sizes: Number of codes of each level (depth + 1 of them; the last may be 0).
        manifest: Where the index came from; None before it is an artefact.
    """

    codes: np.ndarray
    level_sizes: tuple[int, ...]
    manifest: Manifest | None = None

    @property
    def depth(self) -> int:
        """Number of levels without disambiguation."""
        return len(self.level_sizes) - 1

    @property
    def n_items(self) -> int:
        """Size of the catalogue."""
        return len(self.codes)

    def tuples(self) -> list[tuple[int, ...]]:
        """The codes of each item, without the -1 of those that need no disambiguation."""
        return [tuple(row[:-1]) if row[-1] < 0 else tuple(row) for row in self.codes.tolist()]

    def validate(self) -> None:
        """Check the promises that the trie and the decoder rely on.

        Raises:
            UserError: If a code is out of range, two items share a tuple, or one tuple is the beginning of
                another.
        """
        codes = self.codes
        if codes.ndim != 2 or codes.shape[1] != len(self.level_sizes) or self.depth < 1:
            raise UserError(f"codes of shape {codes.shape} do not fit {len(self.level_sizes)} levels: {_AGAIN}")
        sizes = np.asarray(self.level_sizes)
        bad = (codes >= sizes) | (codes < 0)
        bad[:, -1] &= codes[:, -1] != -1
        if bad.any():
            item, level = (int(x[0]) for x in np.nonzero(bad))
            raise UserError(
                f"item {item} has code {codes[item, level]} on level {level}; valid is 0..{sizes[level] - 1}: {_AGAIN}"
            )
        _, group, count = np.unique(row_keys(codes[:, :-1]), return_inverse=True, return_counts=True)
        short = np.flatnonzero((codes[:, -1] < 0) & (count[group] > 1))
        if len(short):
            item = int(short[0])
            other = int(np.flatnonzero((group == group[item]) & (np.arange(len(codes)) != item))[0])
            raise UserError(
                f"items {item} and {other} have the codes {codes[item, :-1].tolist()}, but item {item} has "
                f"no disambiguation code and all of such a group need one: {_AGAIN}"
            )
        _, first, repeated = np.unique(row_keys(codes), return_index=True, return_counts=True)
        if (repeated > 1).any():
            item = int(first[repeated > 1][0])
            raise UserError(f"item {item} shares its whole code {codes[item].tolist()} with another: {_AGAIN}")

    def check_dataset(self, dataset: Manifest) -> None:
        """Refuse a dataset the index was not made from.

        Raises:
            UserError: If the hashes differ; names both and the command that mends it.
        """
        if self.manifest is None:
            raise ValueError("the index was not loaded from an artefact")
        check_input(self.manifest, "dataset", dataset, REMEDY)

    def save(self, folder: Path) -> None:
        """Write `index.safetensors` into an artefact's (partial) folder."""
        tensors = {
            "codes": np.ascontiguousarray(self.codes, dtype=np.int32),
            "level_sizes": np.asarray(self.level_sizes, dtype=np.int32),
        }
        save_file(tensors, folder / INDEX_FILE)

    @classmethod
    def load(cls, path: str | Path) -> ItemIndex:
        """Read and verify an index artefact.

        Raises:
            UserError: If there is none, a file was changed, or the codes break a promise.
        """
        manifest = read_manifest(path, "index")
        return cls.read(Path(path), manifest)

    @classmethod
    def read(cls, folder: Path, manifest: Manifest | None = None) -> ItemIndex:
        """Read the codes of an artefact that was verified.

        Args:
            folder: Its folder.
            manifest: Its manifest, if it is an index.

        Raises:
            UserError: If the codes break a promise.
        """
        tensors = load_file(folder / INDEX_FILE)
        index = cls(tensors["codes"], tuple(int(size) for size in tensors["level_sizes"]), manifest)
        index.validate()
        return index


def build_index(codes: np.ndarray, codebook_sizes: Sequence[int]) -> ItemIndex:
    """Make codes unique and prefix-free.

    Args:
        codes: (items, depth) codebook codes.
        codebook_sizes: Number of codes of each level.

    Returns:
        The index; its last level is as large as the largest group of items with equal codes (0 if there is
        none).
    """
    codes = np.asarray(codes)
    rank, size = _rank_in_group(codes)
    last = np.where(size > 1, rank, -1)
    full = np.concatenate([codes, last[:, None]], axis=1).astype(np.int32)
    index = ItemIndex(full, (*(int(s) for s in codebook_sizes), int(last.max(initial=-1)) + 1))
    index.validate()
    return index


def row_keys(codes: np.ndarray) -> np.ndarray:
    """int64 (n,) that are equal where rows of codes (n, columns) are, and stand in their order.

    Sorting these takes a tenth of the time of sorting the rows.
    """
    keys = np.zeros(len(codes), dtype=np.int64)
    distinct = 1
    for column in np.asarray(codes, dtype=np.int64).T:
        low = int(column.min(initial=0))
        size = int(column.max(initial=0)) - low + 1
        if distinct * size >= 1 << 63:  # number those that occur, of which there are no more than rows
            keys = np.unique(keys, return_inverse=True)[1].astype(np.int64)
            distinct = len(keys)
        keys, distinct = keys * size + (column - low), distinct * size
    return keys


def _rank_in_group(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rank of each item among those with the same codes (in item order), and how many those are."""
    if len(codes) == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    _, group, count = np.unique(row_keys(codes), return_inverse=True, return_counts=True)
    order = np.argsort(group, kind="stable")
    rank = np.empty(len(codes), dtype=np.int64)
    rank[order] = np.arange(len(codes)) - np.repeat(np.cumsum(count) - count, count)
    return rank, count[group]


def save_quantizer(folder: Path, quantizer: Quantizer, embeddings: np.ndarray, says: Said | None = None) -> None:
    """Write what codes new items, and the item embeddings, beside the index.

    Args:
        folder: The artefact's (partial) folder.
        quantizer: A quantizer that was fitted.
        embeddings: float32 (items, dim).
        says: What text says of company, if they are made of both.
    """
    state = {name: np.ascontiguousarray(array) for name, array in quantizer.state().items()}
    save_file(state, folder / QUANTIZER_FILE)
    save_embeddings(folder, embeddings, says)


def save_embeddings(folder: Path, embeddings: np.ndarray, says: Said | None) -> None:
    """Write the item embeddings, float32 (items, dim), and what text says of company, if they are made of both."""
    tensors = {"embeddings": embeddings} | ({} if says is None else says._asdict())
    kept = {name: np.ascontiguousarray(tensor, dtype=np.float32) for name, tensor in tensors.items()}
    save_file(kept, folder / EMBEDDINGS_FILE)


def load_quantizer(path: str | Path, manifest: Manifest | None = None) -> Quantizer:
    """The quantizer of an index, or of a catalogue that grew from one, which codes the embeddings of new items.

    Args:
        path: Folder of the artefact.
        manifest: Its manifest, where it was verified already.

    Raises:
        UserError: If the index was imported and has none, or what was saved is not of the quantizer it names.
    """
    state = load_file(_needed(Path(path) / QUANTIZER_FILE))
    manifest = manifest or read_manifest(path)
    config = manifest.facts.get(MADE_BY, manifest.config)
    name, sizes, options = (config.get(key) for key in ("quantizer", "codebook_sizes", "quantizer_options"))
    try:
        quantizer = build_quantizer(str(name), sizes or [], int(config.get("seed", 0)), options or {})
        quantizer.restore(state)
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} does not hold what its quantizer {name} saves ({error}): {_AGAIN}") from error
    return quantizer


def load_codewords(path: str | Path, depth: int) -> list[np.ndarray]:
    """The vector of every code of an index artefact, float32 (codes, width) a level, as its quantizer adds them up.

    Args:
        path: Folder of the artefact.
        depth: Its codebook levels.

    Raises:
        UserError: If the index was imported, or its quantizer has no vectors that add up.
    """
    try:
        return codewords(load_file(_needed(Path(path) / QUANTIZER_FILE)), depth)
    except KeyError as error:
        raise UserError(f"{path}: its quantizer keeps no vectors of codes that add up ({error})") from error


def load_embeddings(path: str | Path) -> np.ndarray:
    """The item embeddings of an index, or of a catalogue that grew from one, float32 (items, dim).

    Raises:
        UserError: If the index was imported and has none.
    """
    first = load_file(_needed(Path(path) / EMBEDDINGS_FILE))["embeddings"]
    return first if (added := added_embeddings(path)) is None else np.concatenate([first, added])


def added_embeddings(path: str | Path) -> np.ndarray | None:
    """Those of a grown catalogue that are not in the file of its index, float32 (added, dim); None if all are."""
    file = Path(path) / ADDED_FILE
    return load_file(file)["embeddings"] if file.is_file() else None


def embedding_size(path: str | Path) -> int:
    """Dimensions of the item embeddings of an index artefact, which are not read.

    Raises:
        UserError: If the index was imported and has none.
    """
    with safe_open(_needed(Path(path) / EMBEDDINGS_FILE), "numpy") as tensors:
        return int(tensors.get_slice("embeddings").get_shape()[1])


def load_says(path: str | Path) -> Said | None:
    """What text says of company in an index artefact; None where the embeddings are of text alone."""
    with safe_open(_needed(Path(path) / EMBEDDINGS_FILE), "numpy") as tensors:  # without the embeddings
        return Said(*map(tensors.get_tensor, Said._fields)) if "weight" in tensors.keys() else None  # noqa: SIM118


def _needed(path: Path) -> Path:
    if not path.is_file():
        raise UserError(
            f"{path} does not exist: an imported index has no embeddings; use one whose quantizer is not external"
        )
    return path


def read_external(path: str | Path, n_items: int) -> list[tuple[int, ...]]:
    """Read somebody else's semantic IDs.

    Args:
        path: JSON such as `{"0": ["<a_256>", "<b_8>", "<c_99>"], …}` (MiniOneRec, LC-Rec; `<|a_256|>` is read
            too), item number to tokens, one letter a level.
        n_items: Size of the catalogue; every item has to be there.

    Returns:
        The codes of each item, as the file numbers them.

    Raises:
        UserError: If the file is missing, is not of that form, or lists other items than the catalogue's.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"external_index={path}: no such file")
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"external_index={path} is not valid JSON: {error}") from error
    form = 'expected {"0": ["<a_256>", "<b_8>", "<c_99>"], …}'
    if not isinstance(table, dict) or set(table) != {str(i) for i in range(n_items)}:
        found = f"{len(table)} items" if isinstance(table, dict) else type(table).__name__
        raise UserError(f"external_index={path} has {found}, the catalogue numbers 0..{n_items - 1}; {form}")
    letters: dict[int, str] = {}
    tuples = []
    for item in range(n_items):
        codes = []
        tokens = table[str(item)]
        for level, token in enumerate(tokens if isinstance(tokens, list) else [tokens]):
            match = _TOKEN.fullmatch(token) if isinstance(token, str) else None
            if match is None or letters.setdefault(level, match[1]) != match[1]:
                raise UserError(f"external_index={path}: item {item} has {token!r} on level {level}; {form}")
            codes.append(int(match[2]))
        tuples.append(tuple(codes))
    lengths = {len(codes) for codes in tuples}
    if not lengths or min(lengths) < 1 or max(lengths) - min(lengths) > 1:
        raise UserError(
            f"external_index={path}: items have {sorted(lengths)} tokens, which may differ by one at most; {form}"
        )
    return tuples


def external_index(path: str | Path, n_items: int) -> ItemIndex:
    """Import somebody else's semantic IDs as an item index.

    Items with equal tuples get a disambiguation code; where the file disambiguates by one more token itself,
    that token becomes it. Codes keep the file's numbers.

    Args:
        path: See `read_external`.
        n_items: Size of the catalogue.

    Raises:
        UserError: As `read_external`, or if a file with two lengths is not unique and prefix-free.
    """
    tuples = read_external(path, n_items)
    depth = min(map(len, tuples))
    codes = np.array([codes[:depth] for codes in tuples])
    sizes = [int(size) for size in codes.max(0) + 1]
    if all(len(codes) == depth for codes in tuples):
        return build_index(codes, sizes)
    last = np.array([codes[depth] if len(codes) > depth else -1 for codes in tuples])
    full = np.concatenate([codes, last[:, None]], axis=1).astype(np.int32)
    index = ItemIndex(full, (*sizes, int(last.max()) + 1))
    index.validate()
    return index


def external_sids(path: str | Path, n_items: int) -> np.ndarray:
    """Which items somebody else's index cannot tell apart, for metrics that count semantic IDs instead of
    items.

    Args:
        path: See `read_external`.
        n_items: Size of the catalogue.

    Returns:
        int64 (items,) number of each item's semantic ID; items with equal IDs have equal numbers, 0..distinct
        - 1 in the order in which they first occur.
    """
    number: dict[tuple[int, ...], int] = {}
    return np.array([number.setdefault(codes, len(number)) for codes in read_external(path, n_items)], dtype=np.int64)
