"""Artefacts: folders that appear whole or not at all, and know what they were made from.

A stage works in `<out>.partial/` and renames it to `<out>/` at the end, so a kill or a full disk never leaves half
an artefact behind. Every artefact carries a `manifest.json` with the configuration that made it and the content hash
of each input; a loader compares the hashes and says which stage to run again when they disagree.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from reasonrec.tokenizers.errors import UserError

MANIFEST = "manifest.json"
SETTINGS = "unfinished.json"  # in a partial folder: what the run that began it was told
# What a person looks at; it may carry a date or a font and says nothing about the content.
_UNHASHED_SUFFIXES = {".html", ".png", ".md", ".log"}
_UNHASHED_FOLDERS = {"logs"}  # TensorBoard
_NO_SPACE = 1 << 16  # bytes; a disk with less than this is full


@dataclass
class Manifest:
    """What an artefact is and what it was made from.

    Attributes:
        kind: `dataset`, `index`, `adapter`, `model` or `report`.
        config: The parsed configuration of the stage that made it.
        seed: The seed of that stage.
        inputs: Name of each input artefact to its content hash.
        files: Relative path of each hashed file to its SHA-256.
        facts: Whatever a later stage has to know (for a dataset: is the history masked, which split, …).
        kit_version: Version of reasonrec.
        hash: Content hash: SHA-256 over `files`, independent of paths, dates and configuration.
    """

    kind: str
    config: dict[str, Any]
    seed: int
    inputs: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    kit_version: str = ""
    hash: str = ""


def kit_version() -> str:
    """Version of the installed kit."""
    try:
        return version("reasonrec")
    except PackageNotFoundError:  # a bare source tree on the path
        return "unknown"


def file_hash(path: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _hash_files(folder: Path) -> dict[str, str]:
    files = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if not path.is_file() or path.name == MANIFEST or path.suffix in _UNHASHED_SUFFIXES:
            continue
        if relative.parts[0] in _UNHASHED_FOLDERS or relative.parts[0].startswith("checkpoint-"):
            continue
        files[relative.as_posix()] = file_hash(path)
    return files


def content_hash(files: Mapping[str, str]) -> str:
    """One hash over the file hashes of an artefact."""
    digest = hashlib.sha256()
    for name, value in sorted(files.items()):
        digest.update(f"{name}\0{value}\n".encode())
    return digest.hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically (a reader sees the old file or the new one, never a part)."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    temporary.replace(path)


def partial_folder(out: Path) -> Path:
    """The folder a stage works in until its artefact is whole."""
    return out.with_name(out.name + ".partial")


def check_output(out: str | Path, *, overwrite: bool) -> Path:
    """Refuse early to overwrite a finished artefact.

    Raises:
        UserError: If `out` exists and `overwrite` is off.
    """
    out = Path(out)
    if out.exists() and not overwrite:
        raise UserError(f"output_dir={out} exists already; choose another one, or pass --overwrite to move it aside")
    return out


def keep_if_same(
    out: str | Path, settings: Mapping[str, Any], *, free: Mapping[str, str] | None = None
) -> tuple[list[str], dict[str, tuple[str, str]]]:
    """Let a stage go on in its partial folder only with the settings that it began with; clear it otherwise.

    Args:
        out: Where the artefact ends up.
        settings: Whatever decides the result: configuration and hashes of the inputs.
        free: What may differ, and is reported.

    Returns:
        Names of the settings that differ from those of the unfinished run, empty if it goes on or starts anew; and,
        if it goes on, what of `free` differs, before and now.
    """
    work = partial_folder(Path(out))
    wanted = json.loads(json.dumps({"settings": settings, "free": free or {}}, default=str))
    try:
        found = json.loads((work / SETTINGS).read_text(encoding="utf-8"))
        before, freely = dict(found["settings"]), dict(found["free"])
    except (OSError, ValueError, TypeError, KeyError):
        before, freely = {}, {}  # a run that was stopped before it wrote anything of use
    now = wanted["settings"]
    differing = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    changed = {name: (freely[name], new) for name, new in wanted["free"].items() if freely.get(name, new) != new}
    if differing:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    if differing or changed:
        write_json(work / SETTINGS, wanted)
    return (differing if before else []), ({} if differing else changed)


@contextmanager
def disk_full_is_clear(out: Path) -> Iterator[None]:
    """Turn whatever a writer raises on a full disk into one clear message; `staged` does this for what it wraps.

    Args:
        out: The artefact that is being built in its partial folder.

    Raises:
        UserError: If the disk is full.
    """
    work = partial_folder(out)
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not _disk_is_full(error, work):
            raise
        raise UserError(
            f"the disk is full; {work} is unfinished and {out} was not touched: free some space and rerun"
        ) from error


def _disk_is_full(error: BaseException | None, folder: Path) -> bool:
    while error is not None:
        # Writers in Rust (Parquet, safetensors) give no errno, only this text.
        if "No space left on device" in str(error) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    # torch.save and numpy say nothing of the kind, so the disk itself is asked.
    there = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    return shutil.disk_usage(there).free < _NO_SPACE


@contextmanager
def staged(
    out: str | Path,
    *,
    kind: str,
    config: Mapping[str, Any],
    seed: int = 0,
    inputs: Mapping[str, str] | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Build an artefact in `<out>.partial/`, write its manifest, and rename it to `<out>/`.

    Args:
        out: Where the artefact ends up.
        kind: Kind of artefact, written to the manifest.
        config: Configuration of the stage.
        seed: Seed of the stage.
        inputs: Name to content hash of every input artefact.
        overwrite: Move an existing `out` to `<out>.old` (replacing an older one) instead of refusing.
        resume: Keep what an interrupted run left in the partial folder; otherwise it is cleared first.

    Yields:
        The partial folder, and a dictionary for the facts to put into the manifest.

    Raises:
        UserError: If `out` exists and `overwrite` is off, or the disk is full.
    """
    out = check_output(out, overwrite=overwrite)
    work = partial_folder(out)
    if work.exists() and not resume:
        shutil.rmtree(work)
    facts: dict[str, Any] = {}
    with disk_full_is_clear(out):
        work.mkdir(parents=True, exist_ok=True)
        yield work, facts
        (work / SETTINGS).unlink(missing_ok=True)  # the manifest says it from here on
        _readable(work)
        write_manifest(work, kind=kind, config=config, seed=seed, inputs=inputs, facts=facts)
    if out.exists():
        aside = out.with_name(out.name + ".old")
        if aside.exists():
            shutil.rmtree(aside)
        out.rename(aside)
    work.rename(out)


def _readable(folder: Path) -> None:
    """Give every file the mode of an ordinary new one: safetensors makes its files private."""
    manifest = folder / MANIFEST
    manifest.touch()
    mode = manifest.stat().st_mode
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def write_manifest(
    folder: Path,
    *,
    kind: str,
    config: Mapping[str, Any],
    seed: int = 0,
    inputs: Mapping[str, str] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Manifest:
    """Hash the files of `folder` and write its manifest."""
    files = _hash_files(folder)
    manifest = Manifest(
        kind=kind,
        config=dict(config),
        seed=seed,
        inputs=dict(inputs or {}),
        files=files,
        facts=dict(facts or {}),
        kit_version=kit_version(),
        hash=content_hash(files),
    )
    write_json(folder / MANIFEST, manifest.__dict__)
    return manifest


def read_manifest(path: str | Path, kind: str | None = None) -> Manifest:
    """Read and verify the manifest of an artefact.

    Args:
        path: The artefact's folder.
        kind: The kind it has to be, if any.

    Raises:
        UserError: If there is no artefact, it is of another kind, or a file was changed or lost.
    """
    path = Path(path)
    if not (path / MANIFEST).is_file():
        if partial_folder(path).exists():
            raise UserError(f"{path} is unfinished ({partial_folder(path)} exists): run its stage again")
        raise UserError(f"{path} is no artefact of this kit (it has no {MANIFEST}): check the path or run its stage")
    try:
        manifest = Manifest(**json.loads((path / MANIFEST).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path / MANIFEST} is damaged ({error}): run the stage that made {path} again") from error
    if kind is not None and manifest.kind != kind:
        raise UserError(f"{path} is of kind {manifest.kind!r}, needed is {kind!r}")
    for name, expected in manifest.files.items():
        if not (path / name).is_file():
            raise UserError(f"{path / name} is missing: run the stage that made {path} again")
        if file_hash(path / name) != expected:
            raise UserError(f"{path / name} was changed after {path} was made: run its stage again")
    return manifest


def check_input(manifest: Manifest, name: str, actual: Manifest, remedy: str) -> None:
    """Check that an artefact was made from the input that is used with it now.

    Args:
        manifest: Manifest of the artefact that remembers an input.
        name: Name of that input in `manifest.inputs`.
        actual: Manifest of the input at hand.
        remedy: The command that mends a disagreement.

    Raises:
        UserError: If the hashes differ; the message gives both and the remedy.
    """
    expected = manifest.inputs.get(name)
    if expected != actual.hash:
        made = expected[:12] if expected else "nothing"
        raise UserError(
            f"this {manifest.kind} was made with {name} {made}…, but {name} {actual.hash[:12]}… was given; {remedy}"
        )
