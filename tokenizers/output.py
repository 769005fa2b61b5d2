"""Where a stage writes: the output folder and the three names beside it.

`<out>.lock` keeps other processes away, `<out>.partial` is where the artefact is built, `<out>.resume` holds what an
interrupted training goes on from, `<out>.old` what `--overwrite` moved aside. Folders are only cleared if they are
ours, which a manifest or a marker says.
"""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from reasonrec.tokenizers.environment import is_first_process
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.lock import OutputLock

MANIFEST = "manifest.json"
MARKER = "unfinished.json"  # in a partial or resume folder: that it is ours, and what its run was told
REPLIES = ".replies.jsonl"  # behind the output's name: what a teacher answered so far
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_SPACE = 1 << 16  # bytes; a disk with less than this is full
_held: dict[Path, tuple[OutputLock, list[Path]]] = {}  # each lock with the folders that were made for it
_unfinished: dict[Path, None] = {}
_finished: list[Path] = []


def partial_folder(out: Path) -> Path:
    """The folder an artefact is built in until it is whole."""
    return out.with_name(out.name + ".partial")


def resume_folder(out: Path) -> Path:
    """The folder of checkpoints and whatever else an interrupted run goes on from."""
    return out.with_name(out.name + ".resume")


def old_folder(out: Path) -> Path:
    """The folder that `--overwrite` moves an existing artefact to."""
    return out.with_name(out.name + ".old")


def claim_output(out: str | Path, *, overwrite: bool) -> Path:
    """Before any work: check that the output can be written, and keep other processes away from it.

    The lock is held until `release_output`, at the latest to the end of the process. In several processes of one run
    the first holds it.

    Args:
        out: Folder of the finished artefact.
        overwrite: Whether an existing artefact may be moved aside.

    Raises:
        UserError: If the folder is there and may not be overwritten, is no artefact, cannot be written, or is being
            written by another process.
    """
    out = Path(out)
    if not out.name or out.name == "..":
        raise UserError(f"output_dir={out} has no name of its own: give the folder a name, such as runs/{{a name}}")
    if is_first_process():
        _lock(out)
        try:
            _check_place(out, overwrite=overwrite)
        except UserError:
            release_output(out)
            raise
    return out


def _check_place(out: Path, *, overwrite: bool) -> None:
    if out.is_symlink() and not out.exists():
        raise UserError(f"output_dir={out} is a link to nowhere: remove it, or choose another one")
    if out.exists() and not overwrite:
        raise UserError(f"output_dir={out} exists already; choose another one, or pass --overwrite to move it aside")
    if out.exists() and not _is_ours(out):
        raise UserError(
            f"output_dir={out} exists and is no artefact of this kit, so --overwrite does not touch it: choose "
            "another one, or move it away"
        )
    beside = (partial_folder(out), resume_folder(out), *([old_folder(out)] if out.exists() else []))
    for folder in beside:
        if (folder.exists() or folder.is_symlink()) and not _is_ours(folder):
            raise UserError(
                f"{folder} is in the way of output_dir={out} and nothing of this kit (no {MANIFEST}, no {MARKER}): "
                "move it away, or choose another output_dir"
            )


def _lock(out: Path) -> None:
    if out.absolute() in _held:
        return
    try:
        try:
            _take(out)
        except OSError as error:
            left = partial_folder(out)
            if error.errno not in _FULL or not left.exists() or not _is_ours(left):
                raise
            clear(left)  # an earlier run filled the disk; nobody holds the lock, so nobody is writing there
            _take(out)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        remedy = "free some space and rerun" if error.errno in _FULL else "choose another one"
        full = "the disk is full: " if error.errno in _FULL else ""
        raise UserError(f"{full}output_dir={out} cannot be written ({reason}): {remedy}") from error


def _take(out: Path) -> None:
    made = [folder for folder in out.absolute().parents if not folder.exists()]
    lock = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = OutputLock(out)
        # A folder of the longest name that will be needed; a lock file from before needed no space.
        with tempfile.TemporaryDirectory(prefix=f"{out.name}.", dir=out.parent):
            pass
    except (OSError, UserError):
        _let_go(lock, made)
        raise
    _held[out.absolute()] = lock, made
    _unfinished[out] = None


def _let_go(lock: OutputLock | None, made: list[Path]) -> None:
    if lock is not None:
        lock.release()
    with contextlib.suppress(OSError):  # until one is not empty
        for folder in made:
            folder.rmdir()


def release_output(out: str | Path) -> None:
    """Let other processes write an output, and leave nothing of a stage that wrote nothing; twice does no harm."""
    if (held := _held.pop(Path(out).absolute(), None)) is not None:
        _let_go(*held)


def finish_output(out: Path) -> None:
    """An output stands: let other processes write it."""
    release_output(out)
    _unfinished.pop(out, None)
    _finished.append(out)


@contextlib.contextmanager
def releasing_outputs() -> Iterator[None]:
    """For a stage: whatever output it claims is released at its end, however it ends."""
    before, unfinished = set(_held), set(_unfinished)
    try:
        yield
    except Exception:  # not of an interrupt, which says what is unfinished
        for out in set(_unfinished) - unfinished:
            del _unfinished[out]
        raise
    finally:
        for out in set(_held) - before:
            release_output(out)


def is_held(out: Path) -> bool:
    """Whether this process holds an output."""
    return out.absolute() in _held


def unfinished_outputs() -> list[Path]:
    """The outputs that this process claimed and did not finish, in the order in which it claimed them."""
    return list(_unfinished)


def finished_outputs() -> list[Path]:
    """The outputs that this process finished, in their order."""
    return list(_finished)


def kept_of(out: Path) -> list[str]:
    """What an interrupted run left for the one that goes on, a line each."""
    steps = [int(path.name[11:]) for path in resume_folder(out).glob("checkpoint-*") if path.name[11:].isdigit()]
    replies = out.with_name(out.name + REPLIES)
    lines = [f"{resume_folder(out)} keeps the checkpoint of step {max(steps)}"] if steps else []
    if shards := list(resume_folder(out).glob("vectors-*.safetensors")):
        lines.append(f"{resume_folder(out)} keeps {len(shards)} shards of text vectors")
    if replies.is_file():
        lines.append(f"{replies} keeps the replies so far")
    return lines or [f"of {out} nothing is kept"]


def start_folder(folder: Path) -> None:
    """Make a folder that is known to be ours; what was there before goes.

    Raises:
        UserError: If something else is there.
    """
    clear(folder)
    folder.mkdir(parents=True)
    (folder / MARKER).write_text("{}\n", encoding="utf-8")


def clear(folder: Path) -> None:
    """Remove a folder of ours; what says that it is ours goes last, so that a kill in between leaves it ours.

    Raises:
        UserError: If it is not ours.
    """
    if not folder.exists() and not folder.is_symlink():
        return
    if not _is_ours(folder):
        raise UserError(f"{folder} is nothing of this kit (no {MANIFEST}, no {MARKER}): move it away")
    for path in sorted(folder.iterdir(), key=lambda path: path.name in (MANIFEST, MARKER)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    folder.rmdir()


def _is_ours(folder: Path) -> bool:
    """Whether a folder carries our manifest or our marker; an empty one has nothing to lose."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    if (folder / MARKER).is_file() or not any(folder.iterdir()):
        return True
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and {"kind", "files", "hash"} <= manifest.keys()


@contextlib.contextmanager
def disk_full_is_clear(out: Path) -> Iterator[None]:
    """Turn whatever a writer raises on a full disk into one clear message.

    Args:
        out: The artefact that is being made.

    Raises:
        UserError: If the disk is full.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not _disk_is_full(error, out):
            raise
        raise UserError(
            f"the disk is full; {partial_folder(out)} is unfinished and {out} was not touched: free some space and "
            "rerun"
        ) from error


def _disk_is_full(error: BaseException | None, folder: Path) -> bool:
    while error is not None:
        # Writers in Rust (Parquet, safetensors) give no errno, only this text.
        if "No space left on device" in str(error) or getattr(error, "errno", None) in _FULL:
            return True
        error = error.__cause__ or error.__context__
    # torch.save and numpy say nothing of the kind, so the disk itself is asked.
    there = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    return shutil.disk_usage(there).free < _NO_SPACE
