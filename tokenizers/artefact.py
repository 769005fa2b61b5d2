"""Artefacts: folders that appear whole or not at all, and know what they were made from.

A stage works in `<out>.partial/` and renames it to `<out>/` at the end, so a kill or a full disk never leaves half
an artefact behind. Every artefact carries a `manifest.json` with the configuration that made it and the content hash
of each input; a loader compares the hashes and says which stage to run again when they disagree.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.manifest import Manifest, check_names, distinct, is_content, parse_manifest, plain
from reasonrec.tokenizers.output import (
    MANIFEST,
    MARKER,
    claim_output,
    clear,
    disk_full_is_clear,
    finish_output,
    is_held,
    old_folder,
    partial_folder,
    release_output,
    resume_folder,
    start_folder,
)
from reasonrec.tokenizers.terminal import say

if TYPE_CHECKING:
    from numpy.typing import NDArray


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


def _hash_files(folder: Path, known: Mapping[str, str]) -> dict[str, str]:
    found = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    names = {name.as_posix(): path for name, path in found.items() if is_content(name)}
    return {name: known.get(name) or file_hash(path) for name, path in names.items()}


def _share(source: Path, target: Path) -> bool:
    """Give a file a second name, or copy it where that cannot be; returns whether both names are one file."""
    try:
        os.link(source.resolve(), target)  # of a link to a file, the file
    except OSError:  # another file system, one without hard links, or a file of somebody else
        shutil.copyfile(source, target)
        return False
    return True


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically (a reader sees the old file or the new one, never a part)."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    temporary.replace(path)


def write_tensors(path: Path, tensors: Mapping[str, NDArray[Any]], about: Mapping[str, str]) -> None:
    """Write arrays into a safetensors file atomically, with strings about them."""
    from safetensors.numpy import save_file  # commands that write none start without it

    partial = path.with_suffix(".partial")
    save_file(dict(tensors), partial, metadata=dict(about))
    partial.replace(path)


@contextmanager
def staged(
    out: str | Path,
    *,
    kind: str,
    config: Mapping[str, Any],
    seed: int = 0,
    inputs: Mapping[str, str] | None = None,
    overwrite: bool = False,
    shared: Mapping[Path, str] | None = None,
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Build an artefact in `<out>.partial/`, write its manifest, and rename it to `<out>/`.

    What an interrupted run would have gone on from (`<out>.resume/`) goes only when the artefact stands.

    Args:
        out: Where the artefact ends up.
        kind: Kind of artefact, written to the manifest.
        config: Configuration of the stage.
        seed: Seed of the stage.
        inputs: Name to content hash of every input artefact.
        overwrite: Move an existing `out` to `<out>.old` (replacing an older one) instead of refusing.
        shared: Files that this artefact has unchanged, under their names, with the SHA-256 that `read_manifest` found
            them to have. They are linked where the file system can (one file then lies in both folders, and outlives
            either), so neither copied nor hashed again, and copied where not. Nobody may write to them.

    Yields:
        The partial folder, with its marker and what is shared, and a dictionary for facts to put into the manifest.

    Raises:
        UserError: If `claim_output` refuses, the disk is full, or a file is missing or of no use in this kind.
    """
    mine = not is_held(Path(out))
    out = claim_output(out, overwrite=overwrite)
    work = partial_folder(out)
    facts: dict[str, Any] = {}
    try:
        with disk_full_is_clear(out):
            start_folder(work)
            known = {path.name: sha for path, sha in (shared or {}).items() if _share(path, work / path.name)}
            yield work, facts
            _readable(work, known)
            write_manifest(work, kind=kind, config=config, seed=seed, inputs=inputs, facts=facts, known=known)
        _put_in_place(out)
    finally:
        if mine:
            release_output(out)


def adopt(
    out: Path, *, kind: str, config: Mapping[str, Any], seed: int, inputs: Mapping[str, str], overwrite: bool
) -> bool:
    """Finish a run that was stopped between its last written file and its name.

    Args:
        out: Where the artefact ends up.
        kind: As for `staged`, like all that follows; a partial folder that says anything else is left alone.
        config: Likewise.
        seed: Likewise.
        inputs: Likewise.
        overwrite: Likewise.

    Returns:
        Whether there was a whole artefact, which now stands.
    """
    try:
        found = read_manifest(partial_folder(out), kind)
    except UserError:
        return False
    if (found.config, found.seed, found.inputs) != (plain(config), seed, plain(inputs)):
        return False
    claim_output(out, overwrite=overwrite)
    _put_in_place(out)
    say(f"{out} was whole but for its name, which it has now")
    return True


def _put_in_place(out: Path) -> None:
    """Give a whole partial folder its name; only then what a run would have gone on from may go."""
    (partial_folder(out) / MARKER).unlink(missing_ok=True)  # the manifest says whose it is from here on
    if out.exists():
        clear(old_folder(out))
        out.rename(old_folder(out))
    partial_folder(out).rename(out)
    clear(resume_folder(out))
    finish_output(out)


def _readable(folder: Path, known: Mapping[str, str]) -> None:
    """Give every new file the mode of an ordinary one: safetensors makes its files private."""
    mode = (folder / MARKER).stat().st_mode
    for path in folder.rglob("*"):
        if path.is_file() and path.relative_to(folder).as_posix() not in known:
            path.chmod(mode)


def write_manifest(
    folder: Path,
    *,
    kind: str,
    config: Mapping[str, Any],
    seed: int = 0,
    inputs: Mapping[str, str] | None = None,
    facts: Mapping[str, Any] | None = None,
    known: Mapping[str, str] | None = None,
) -> Manifest:
    """Hash the files of `folder`, but for those whose SHA-256 is `known` by name, and write its manifest.

    Raises:
        UserError: If a file is missing or of no use in this kind.
    """
    files = _hash_files(folder, known or {})
    check_names(folder, kind, files)
    manifest = Manifest(kind, plain(config), seed, plain(inputs or {}), files, plain(facts or {}), kit_version())
    manifest.hash_again()
    write_json(folder / MANIFEST, asdict(manifest))
    return manifest


def read_manifest(path: str | Path, kind: str | None = None) -> Manifest:
    """Read and verify the manifest of an artefact.

    Args:
        path: The artefact's folder.
        kind: The kind it has to be, if any.

    Raises:
        UserError: If there is no artefact, it is of another kind, or a file was changed, lost or added.
    """
    path = Path(path)
    if not (path / MANIFEST).is_file():
        for beside in (partial_folder(path), resume_folder(path)) if path.name else ():
            if beside.exists():
                raise UserError(f"{path} is unfinished ({beside} exists): run its stage again")
        raise UserError(f"{path} is no artefact of this kit (it has no {MANIFEST}): check the path or run its stage")
    try:
        manifest = parse_manifest(
            json.loads((path / MANIFEST).read_text(encoding="utf-8"), object_pairs_hook=distinct)
        )
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path / MANIFEST} is damaged ({error}): run the stage that made {path} again") from error
    if kind is not None and manifest.kind != kind:
        raise UserError(f"{path} is of kind {manifest.kind!r}, needed is {kind!r}")
    check_names(path, manifest.kind, manifest.files)
    for name, expected in manifest.files.items():
        if not (path / name).is_file():
            raise UserError(
                f"{path / name} is missing: run the stage that made {path} again, or get it anew (SHA-256 "
                f"{expected[:12]}… is expected)"
            )
        if (found := file_hash(path / name)) != expected:
            raise UserError(
                f"{path / name} was changed after {path} was made: run its stage again, or get it anew (its SHA-256 "
                f"is {found[:12]}…, {expected[:12]}… was expected)"
            )
    if manifest.version == 1:
        warnings.warn(f"{path} was made by an older version of this kit (its manifest has no seal)", stacklevel=2)
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
