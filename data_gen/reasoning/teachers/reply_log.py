"""Replies of a slow or paid teacher, kept line by line, so that no reply is ever asked for twice.

Each line carries a hash of the whole request. A log may therefore be shared between runs: a changed prompt, model or
temperature simply finds nothing under its hash, and what was paid for stays.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reasonrec.tokenizers.environment import is_first_process
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.terminal import one_line


def request_hash(request: Mapping[str, Any]) -> str:
    """Identifies a request by everything that decides its reply."""
    text = json.dumps(request, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


class ReplyLog:
    """A JSONL file of replies, safe to append to from several threads, and to be killed at any moment.

    Args:
        path: The file; it need not be there yet.

    Raises:
        UserError: If the file holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._entries: dict[str, dict[str, Any]] = {}
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            return
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}): name another file with `replies`") from error
        whole, torn = raw[: raw.rfind(b"\n") + 1], raw[raw.rfind(b"\n") + 1 :]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                entry = _entry(json.loads(line))
                self._entries[entry["request"]] = entry
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{path}, line {number} is no reply ({one_line(error)}): mend or remove the line, or name "
                    "another file with `replies`"
                ) from error
        if torn:  # a kill in the middle of a line; that reply is asked for again
            with path.open("r+b") as stream:
                stream.truncate(len(whole))

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, request: str) -> dict[str, Any] | None:
        """The entry of a request, if there is one."""
        return self._entries.get(request)

    def add(self, entry: Mapping[str, Any]) -> None:
        """Append an entry; it has a `request` and is on the disk when this returns.

        Of several processes the first one writes it, and the others remember it.
        """
        line = json.dumps(entry, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        with self._lock:
            if is_first_process():
                with self.path.open("ab") as stream:
                    stream.write(line)
            self._entries[entry["request"]] = dict(entry)


def _entry(value: Any) -> dict[str, Any]:
    """The value, if it is what a teacher reads again.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}, not an object")
    if not isinstance(value.get("request"), str):
        raise ValueError("`request` is missing or no text")
    for name in ("text", "problem"):
        if name not in value or not isinstance(value[name], str | None):
            raise ValueError(f"`{name}` is missing, or neither text nor null")
    return value
