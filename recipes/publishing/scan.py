"""What must not leave this machine: secrets, absolute paths, its name. A published folder is scanned before a push."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.terminal import shown

# Files of which this kit or a training writes every line; the others are the tokenizer's, which anybody may have.
_OURS = frozenset({"README.md", "manifest.json", "train_metrics.json"})
_CONFIGS = frozenset({"adapter_config.json", "config.json", "generation_config.json"})
_TEXT = frozenset({".md", ".json", ".jinja", ".txt", ".py"})
_SECRETS = {
    "a token of the Hub": r"\bhf_[A-Za-z0-9]{20,}",
    "an API key": r"\bsk-[A-Za-z0-9_-]{20,}|\bAKIA[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{30,}|\bxox[abps]-[\w-]{10,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password in an address": r"://[^/\s:@]+:[^/\s:@]+@",
}
_PATHS = {
    # Not behind a letter, a tilde or a further slash, as in addresses, fractions and closing tags.
    "an absolute path": r"(?<![\w.:/~<)\]])/[\w.-]+/[\w.-]",
    "a path of Windows": r"\b[A-Za-z]:\\{1,2}[\w.-]",
    "a path below the home folder": r"(?<![\w/])~/\w",
}
_NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|API_?KEY", re.IGNORECASE)  # of variables whose value is nobody's business


def scan(folder: Path, more: Mapping[str, str]) -> None:
    """Check that nothing in a folder tells what is private.

    Args:
        folder: A folder that is to be published.
        more: Texts of files that are still to be written, by name.

    Raises:
        UserError: If a line does; it names the file and the line, and shows no secret.
    """
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix in _TEXT]
    texts = {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8", errors="replace") for path in paths}
    for name, text in {**texts, **more}.items():
        for number, line in enumerate(text.splitlines(), start=1):
            for what, found in _private(line, everything=name in _OURS | _CONFIGS):
                raise UserError(
                    f"{name}, line {number}, holds {what}{f': {shown(found)}' if found else ''}; nothing is "
                    "published: take it out of what the line comes from (a name, a prompt, a file of the model), and "
                    "publish again"
                )


def _private(line: str, *, everything: bool) -> Iterator[tuple[str, str]]:
    """What is private in a line, and the text of it unless that is a secret."""
    for what, pattern in _SECRETS.items():
        if re.search(pattern, line):
            yield what, ""
    for name, value in os.environ.items():
        if len(value) >= 12 and _NAMES.search(name) and value in line:
            yield f"the value of {name}", ""
    home = str(Path.home())
    if len(home) > 1 and re.search(rf"{re.escape(home)}(?![\w.-])", line) and home.count("/") > 1:
        yield "a path below the home folder", home
    if not everything:
        return
    for what, pattern in _PATHS.items():
        if match := re.search(pattern, line):
            yield what, line[match.start() : match.start() + 60]
    host = socket.gethostname()
    # A machine called "model" would refuse every card, so a name counts if it cannot be a word.
    if re.search(r"[\d.-]", host) and re.search(rf"(?<![\w.-]){re.escape(host)}(?![\w.-])", line):
        yield "the name of this machine", host
