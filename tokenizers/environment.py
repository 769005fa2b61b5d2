"""What a process takes from its surroundings: the home folder in paths, how threads wait, what malloc gives back."""

from __future__ import annotations

import ctypes
import os
import re
import sys

from reasonrec.tokenizers.errors import UserError

SPINS = "3000"  # as in the Makefile
_HOME = re.compile(r"~[\w.-]*(/|$)")


def expand_home(path: str, name: str) -> str:
    """A path with `~` or `~user` in front written out, as a shell does it; anything else comes back as it is.

    Args:
        path: A path, or a name that may stand in its place (a Hub id, `package:NAME`): those do not begin with `~`.
        name: What it is called in a message.

    Raises:
        UserError: If there is no such home folder.
    """
    if not _HOME.match(path):
        return path
    home, expanded = path.split("/", 1)[0], os.path.expanduser(path)  # noqa: PTH111 (Path would raise, and drop a slash)
    if home == "~" and (expanded == path or os.environ.get("HOME") == ""):
        raise UserError(f"{name}={path}: HOME is not set; write the whole path")
    if expanded == path:
        raise UserError(f"{name}={path}: there is no user {home[1:]!r} here; write the whole path")
    return expanded


def is_first_process() -> bool:
    """Whether this is the process of a launch that writes, and speaks, for all; known before PyTorch is imported."""
    return os.environ.get("RANK", "0") == "0"


def wait_passively() -> None:
    """Let OpenMP's threads sleep where they wait for each other, unless the user has set OMP_WAIT_POLICY.

    By default they spin at every barrier. On a core that a busy neighbour holds, each step then waits for a thread
    that cannot run. To fall asleep at once costs a fifth of a training step, though, for most waits are short: GNU's
    OpenMP looks `SPINS` times first, some microseconds. A thousand were too few (a tenth of a 4-bit step in float32
    was lost), five thousand made a step beside a busy process 2.4 times as long. Both are read when a library with
    OpenMP is loaded, so call this before PyTorch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def keep_freed_memory() -> None:
    """Let the GNU C library keep the memory that is freed, unless the user has set its allocator up.

    By default it gives large blocks back after every operation and asks for them again, and each time the kernel fills
    them with zeros, page by page. A training step on a CPU does that thousands of times. What a process holds then is
    what it once needed at most.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        set_option(option, 1 << 30)
