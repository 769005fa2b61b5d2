"""The manifest of an artefact: its format, what is checked on reading it, and which files each kind has.

The content hash and the seal tell damage and mix-ups, not forgery: who can write the folder can write its manifest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, get_type_hints

from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.model_folder import check_links
from reasonrec.tokenizers.output import MANIFEST, MARKER

VERSION = 2  # of the manifest
# What a person looks at; it may carry a date or a font and says nothing about the content.
_FOR_PEOPLE = {".html", ".png", ".md", ".log"}
_LOGS = "logs"  # TensorBoard
_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.jinja",
)


@dataclass(frozen=True)
class Files:
    """The files of a kind of artefact, beside those that only people look at.

    Attributes:
        required: Names that have to be there; of several joined by `|` one is enough.
        allowed: Patterns of further names.
        records: What a run measured (times): outside of the content hash, so that equal runs have equal ones.
    """

    required: tuple[str, ...]
    allowed: tuple[str, ...] = ()
    records: tuple[str, ...] = ()


KINDS = {
    "dataset": Files(("items.parquet", "users.parquet", "train.parquet", "valid.parquet", "test.parquet")),
    "index": Files(("index.safetensors",), ("embeddings.safetensors", "quantizer.safetensors", "health.json")),
    "catalogue": Files(
        ("catalogue.parquet", "index.safetensors", "quantizer.safetensors", "embeddings.safetensors"),
        ("added.safetensors",),
    ),
    "traces": Files(("train.parquet", "valid.parquet"), ("report.json",)),
    "adapter": Files(
        ("adapter_config.json", "adapter_model.safetensors", "catalogue.parquet"),
        ("index.safetensors", "policy.safetensors", "expert_*.safetensors", *_TOKENIZER, "*.py"),
        ("train_metrics.json",),
    ),
    "model": Files(
        ("config.json", "model.safetensors|model.safetensors.index.json", "catalogue.parquet"),
        (
            *("index.safetensors", "policy.safetensors", "expert_*.safetensors", "model-*.safetensors"),
            *("generation_config.json", *_TOKENIZER, "*.py"),
        ),
        ("train_metrics.json",),
    ),
    "report": Files(("metrics.json",), (), ("metrics.json",)),
    "comparison": Files(("quantizers.json",), (), ("quantizers.json",)),
}


@dataclass
class Manifest:
    """What an artefact is and what it was made from.

    Attributes:
        kind: A key of `KINDS`.
        config: The parsed configuration of the stage that made it.
        seed: The seed of that stage.
        inputs: Name of each input artefact to its content hash.
        files: Relative path of each hashed file to its SHA-256.
        facts: Whatever a later stage has to know (for a dataset: is the history masked, which split, …).
        kit_version: Version of reasonrec.
        hash: Content hash, which other artefacts refer to: over kind, files and facts, without paths, configuration,
            and what a run measured.
        version: Of this format.
        seal: SHA-256 over all of the above.
    """

    kind: str
    config: dict[str, Any]
    seed: int
    inputs: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    kit_version: str = ""
    hash: str = ""
    version: int = VERSION
    seal: str = ""

    def content(self) -> str:
        """The content hash as it has to be."""
        if self.version == 1:
            return content_hash(self.files)
        records = KINDS[self.kind].records if self.kind in KINDS else ()
        files = {name: value for name, value in self.files.items() if name not in records}
        return _digest({"kind": self.kind, "files": files, "facts": self.facts})

    def sealed(self) -> str:
        """The seal as it has to be."""
        return _digest({name: value for name, value in asdict(self).items() if name != "seal"})

    def hash_again(self) -> None:
        """Set content hash and seal to what they have to be."""
        self.hash = self.content()
        self.seal = self.sealed()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def plain(value: Any) -> Any:
    """A value as JSON gives it back, the same in every run: sets are sorted, whatever is unknown is text."""
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(plain, value), key=str)
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return value if value is None or isinstance(value, str | int | float) else str(value)


def is_content(relative: Path) -> bool:
    """Whether a file of an artefact is hashed: not what only people look at, nor the manifest itself.

    Args:
        relative: Its path in the folder.
    """
    people = relative.suffix in _FOR_PEOPLE or relative.parts[0] == _LOGS
    return not people and relative.name not in (MANIFEST, MARKER)


def content_hash(files: Mapping[str, str]) -> str:
    """One hash over the file hashes of an artefact: the content hash of manifests of version 1."""
    digest = hashlib.sha256()
    for name, value in sorted(files.items()):
        digest.update(f"{name}\0{value}\n".encode())
    return digest.hexdigest()


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object that gives no key twice; for `json.loads`.

    Raises:
        ValueError: If it does.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands there twice")
    return found


def parse_manifest(found: Any) -> Manifest:
    """A manifest whose every entry has its type, and whose hashes are those of its content.

    Raises:
        TypeError: If an entry is missing, unknown or of another type.
        ValueError: If a hash does not fit, a name leaves the folder, or a newer version wrote it.
    """
    if not isinstance(found, dict):
        raise TypeError("it is no object")
    number = found.setdefault("version", 1)
    if isinstance(number, int) and number > VERSION:
        raise ValueError(f"it has version {number}, this kit knows {VERSION}: update reasonrec")
    expected = {name: getattr(kind, "__origin__", kind) for name, kind in get_type_hints(Manifest).items()}
    if number == 1:
        found.setdefault("seal", "")
    if found.keys() != expected.keys():
        raise TypeError(f"missing or unknown: {', '.join(map(repr, sorted(found.keys() ^ expected.keys())))}")
    for name, kind in expected.items():
        if not isinstance(found[name], kind) or isinstance(found[name], bool):
            raise TypeError(f"{name} is no {kind.__name__}")
    manifest = Manifest(**found)
    if number not in (1, VERSION):
        raise ValueError(f"there is no version {number}")
    for name in ("inputs", "files"):
        if not all(isinstance(value, str) for value in found[name].values()):
            raise TypeError(f"{name} holds more than text")
    for file in manifest.files:
        parts = PurePosixPath(file).parts
        if not parts or parts[0] == "/" or ".." in parts or "\\" in file or "\0" in file or ":" in file:
            raise ValueError(f"the file {file!r} is not in the folder")
    if manifest.hash != manifest.content() or (number > 1 and manifest.seal != manifest.sealed()):
        raise ValueError("it was changed after it was written")
    return manifest


def check_names(folder: Path, kind: str, names: Mapping[str, str]) -> None:
    """Check that a folder has the files of its kind, and no others but those for people.

    Args:
        folder: The folder.
        kind: Kind of artefact; one that is unknown may hold anything.
        names: The files that its manifest names, or will name.

    Raises:
        UserError: If it does not, or a link in it leads out of it.
    """
    check_links(folder)
    remedy = f"run the stage that made {folder} again"
    if kind in KINDS:
        files = KINDS[kind]
        for choice in files.required:
            if not any(name in names for name in choice.split("|")):
                raise UserError(f"{folder} is of kind {kind!r} and has no {choice.replace('|', ' or ')}: {remedy}")
        patterns = [name for choice in files.required for name in choice.split("|")] + [*files.allowed, *files.records]
        for name in names:
            if not any(fnmatchcase(name, pattern) for pattern in patterns):
                raise UserError(f"{folder} holds {name}, which no artefact of kind {kind!r} has: {remedy}")
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)  # what version control and the Hub keep
        if path.is_file() and not hidden and is_content(relative) and relative.as_posix() not in names:
            raise UserError(f"{path} was put there after {folder} was made: remove it, or {remedy}")
