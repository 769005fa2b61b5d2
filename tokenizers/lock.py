"""One writer per output: a lock file beside the folder that a stage is about to write.

The kernel holds the lock for the process, so a kill of any kind lets it go, and a file that stays means nothing. Some
network file systems have no such locks. There the file itself is the lock: it is created exclusively, touched every
few seconds, and counts as left behind once nobody has touched it for a while.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shlex
import socket
import sys
import threading
import time
import warnings
from pathlib import Path

from reasonrec.tokenizers.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SUFFIX = ".lock"
BEAT = 5.0  # seconds between two touches where the file system has no locks
STALE = 60.0  # seconds without a touch after which such a lock was left behind
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


def lock_path(out: Path) -> Path:
    """The lock file of an output folder."""
    return out.with_name(out.name + SUFFIX)


class OutputLock:
    """Held by the one process that writes an output folder, until `release` or the end of the process.

    Args:
        out: The folder; its parent has to be there.

    Raises:
        UserError: If another process holds it; the message says which.
        OSError: If the lock file cannot be written.
    """

    def __init__(self, out: Path) -> None:
        self.path = lock_path(out)
        self._owner = os.getpid()
        self._ended = threading.Event()
        self._stream: int | None = None
        if fcntl is None or not self._lock_by_kernel():
            self._lock_by_file()

    def _lock_by_kernel(self) -> bool:
        """Take the kernel's lock; False if the file system has none."""
        while True:
            stream = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(stream)
                if error.errno in _NO_LOCKS:
                    return False
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise self._held() from None
                raise
            # Whoever held it before may have removed the file between our opening and our locking it.
            with contextlib.suppress(OSError):
                if os.fstat(stream).st_ino == self.path.stat().st_ino:
                    break
            os.close(stream)
        os.ftruncate(stream, 0)
        with contextlib.suppress(OSError):  # on a full disk it stays empty: only its lock counts
            os.write(stream, _myself())
        self._stream = stream
        # A forked worker that outlives us would keep the lock.
        os.register_at_fork(after_in_child=self._forget)
        return True

    def _lock_by_file(self) -> None:
        """Create the file exclusively and keep touching it."""
        warnings.warn(
            f"{self.path}: this file system has no locks; a file that is touched every {BEAT:.0f} s keeps other "
            "processes away",
            stacklevel=4,
        )
        if self.path.exists() and time.time() - self.path.stat().st_mtime > STALE:
            self.path.unlink(missing_ok=True)
        try:
            stream = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            raise self._held() from None
        os.write(stream, _myself())
        os.close(stream)
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def _held(self) -> UserError:
        try:
            holder = json.loads(self.path.read_text(encoding="utf-8"))
            who = f"process {int(holder['process'])} on {holder['host']} ({holder['command']})"
        except (OSError, ValueError, TypeError, KeyError):
            who = "another process"
        out = self.path.with_name(self.path.name.removesuffix(SUFFIX))
        return UserError(
            f"{out} is being written by {who}: wait for it, or choose another output_dir (the lock is {self.path})"
        )

    def _forget(self) -> None:
        """In a forked child: close our copy, which does not end the parent's lock."""
        if self._stream is not None and os.getpid() != self._owner:
            with contextlib.suppress(OSError):
                os.close(self._stream)
            self._stream = None

    def release(self) -> None:
        """Let go and remove the file; once is enough, more do no harm."""
        if self._ended.is_set() or os.getpid() != self._owner:
            return
        self._ended.set()
        self.path.unlink(missing_ok=True)  # while it is still ours
        if self._stream is not None:
            os.close(self._stream)
            self._stream = None


def _myself() -> bytes:
    command = shlex.join(sys.argv)[:500]
    return json.dumps({"host": socket.gethostname(), "process": os.getpid(), "command": command}).encode() + b"\n"
