"""The weights that ranked the validation cases best, kept beside the checkpoints until the artefact is written."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

_PREFIX = "best-"  # and the step


def best_folder(folder: Path, step: int) -> Path:
    """Where the weights of a step are kept.

    Args:
        folder: Folder of the checkpoints.
        step: The step.
    """
    return folder / f"{_PREFIX}{step}"


def keep_best(folder: Path, step: int, write: Callable[[Path], None]) -> None:
    """Keep the weights of a step; those of an earlier one go only when these are there.

    Args:
        folder: Folder of the checkpoints.
        step: The step.
        write: Writes the weights into a folder.
    """
    best = best_folder(folder, step)
    unfinished = best.with_name(f"{best.name}.partial")
    write(unfinished)
    if best.exists():  # a resumed run ranks its start once more
        shutil.rmtree(best)
    unfinished.rename(best)
    for path in folder.glob(f"{_PREFIX}*"):
        if path != best:
            shutil.rmtree(path)


def copy_best(folder: Path, out: Path, log: Sequence[Mapping[str, Any]], metric: str) -> int | None:
    """Copy the weights that ranked best, of those that are there.

    Args:
        folder: Folder of the checkpoints.
        out: Where to.
        log: The trainer's log.
        metric: Its entry that is compared; of equal ones the earliest step counts.

    Returns:
        Their step, None if none were kept.
    """
    found = {line["step"]: line[metric] for line in log if metric in line}
    kept = [step for step in found if best_folder(folder, step).is_dir()]
    if not kept:
        return None
    best = max(kept, key=lambda step: (found[step], -step))
    shutil.copytree(best_folder(folder, best), out, dirs_exist_ok=True)
    return best
