"""How a manifest names the paths of this machine: relative to the artefact, so that a run can move as a whole.

Absolute paths would be published with it, and with them the names of people and machines.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePath

from reasonrec.tokenizers.environment import expand_home


def is_local(reference: str) -> bool:
    """Whether a reference is a path of this machine, and no Hub id or `package:NAME`."""
    return not reference.startswith("package:") and Path(reference).exists()


def place(reference: str, out: str | Path) -> str:
    """A reference as the manifest of an artefact keeps it, for `located`.

    Args:
        reference: A path, a Hub id, or `package:NAME`; only a path that exists is changed.
        out: Folder of the finished artefact.

    Returns:
        The path relative to the artefact, `../dataset`; below the home folder if the artefact is not, `~/models/base`.
    """
    if not is_local(reference):
        return reference
    target, here, home = (_real(path) for path in (Path(reference), Path(out), Path.home()))
    if home != Path(home.anchor) and target.is_relative_to(home) and not here.is_relative_to(home):
        return f"~/{target.relative_to(home).as_posix()}"
    return PurePath(os.path.relpath(target, here)).as_posix()


def own_name(reference: str) -> str:
    """A reference without its place: the last name of a path, anything else as it is."""
    return _real(Path(reference)).name if is_local(reference) else reference


def located(name: str, folder: str | Path) -> str:
    """What `place` was given, seen from where the artefact is now.

    Args:
        name: As the manifest has it; older ones have paths as they were given.
        folder: Folder of the artefact.

    Raises:
        UserError: If it is below a home folder that is not there.
    """
    if name.split("/", 1)[0] in (".", ".."):
        return os.path.normpath(Path(folder).resolve() / name)
    return expand_home(name, "a path in the manifest")


def _real(path: Path) -> Path:
    """Without links in front of its last name, which may be one on purpose."""
    return Path(os.path.normpath(path.parent.resolve() / path.name))
