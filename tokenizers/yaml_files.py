"""Reading YAML: plain values in mappings and lists, of bounded size, with messages that fit on one line.

Left out is what a configuration has no use for and what can hurt: tags (`!!python/…`), merge keys (`<<`), and YAML's
own reading of dates (2024-05-01) and numbers of base 60 (1:30), which stay the text that was written.
"""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from reasonrec.tokenizers.environment import expand_home
from reasonrec.tokenizers.errors import UserError

MAX_BYTES = 1 << 18
MAX_DEPTH = 40
MAX_VALUES = 20_000  # with what aliases repeat, which is how a few lines become billions
_YAML = "tag:yaml.org,2002:"
_RESOLVED = {f"{_YAML}{kind}" for kind in ("null", "bool", "int", "float")}


class _PlainLoader(yaml.SafeLoader):
    """YAML with the bounds above; a key given twice is refused, because all but the last would be read by nobody."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own attribute
        first: [(tag, pattern) for tag, pattern in resolvers if tag in _RESOLVED]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._values = 0
        self._sizes: dict[yaml.Node | None, int] = {}  # values in each node that is complete

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Read a node, and count what is in it."""
        event, before = self.peek_event(), self._values
        if isinstance(event, yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if node not in self._sizes:
                raise _problem(event, f"*{event.anchor} stands inside of what it repeats")
            self._values += self._sizes[node]
        else:
            if event.tag not in (None, "!", f"{_YAML}str"):
                tag = event.tag.replace(_YAML, "!!")
                raise _problem(event, f"the tag {tag} is not supported: write a plain value")
            self._depth += 1
            if self._depth > MAX_DEPTH:
                raise _problem(event, f"lists and mappings stand more than {MAX_DEPTH} levels deep")
            node = super().compose_node(parent, index)
            self._depth -= 1
            self._values += 1
            self._sizes[node] = self._values - before
        if self._values > MAX_VALUES:
            raise _problem(event, f"more than {MAX_VALUES:,} values, counting what aliases (*name) repeat")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping."""
        seen = set()
        for key_node, _ in node.value:
            if key_node.value == "<<" and key_node.style is None:
                raise _problem(key_node, "merge keys (<<) are not supported: write the keys out")
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise _problem(key_node, f"key {key!r} is given twice")
            seen.add(key if isinstance(key, Hashable) else None)
        return super().construct_mapping(node, deep)

    def plain_int(self, node: yaml.ScalarNode) -> int | str:
        """Build an integer."""
        if ":" in node.value:
            return str(node.value)
        try:
            value = int(self.construct_yaml_int(node))
        except ValueError:  # more digits than Python reads, or none
            value = 1 << 63
        if not -(1 << 63) <= value < 1 << 63:
            raise _problem(node, f"{node.value[:40]!r} is no whole number of 64 bits; put text in quotes")
        return value

    def plain_float(self, node: yaml.ScalarNode) -> float | str:
        """Build a number with a point."""
        return str(node.value) if ":" in node.value else float(self.construct_yaml_float(node))


_PlainLoader.add_constructor(f"{_YAML}int", _PlainLoader.plain_int)
_PlainLoader.add_constructor(f"{_YAML}float", _PlainLoader.plain_float)


def _problem(at: Any, text: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=text, problem_mark=at.start_mark)


def load_yaml(text: str) -> Any:
    """Read YAML.

    Returns:
        What it says: mappings, lists, text, numbers, truth values and None.

    Raises:
        UserError: If it is none, or beyond the bounds of this module; says where on one line.
    """
    if len(text) > MAX_BYTES:
        raise UserError(f"not valid YAML here: it is longer than {MAX_BYTES >> 10} KiB")
    try:
        return yaml.load(text, _PlainLoader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        what = " ".join(part for part in (error.context, error.problem) if part)
        raise UserError(f"not valid YAML: {line}{what}") from error
    except yaml.YAMLError as error:
        raise UserError(f"not valid YAML: {' '.join(str(error).split())}") from error
    except (ValueError, OverflowError) as error:  # an escape or a directive whose number is out of range
        raise UserError(f"not valid YAML: {error}") from error


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        UserError: If the file is missing, is not YAML, or holds something else than a mapping.
    """
    path = Path(expand_home(str(path), "--config"))
    if not path.is_file():
        raise UserError(f"--config {path}: no such file")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"--config {path} cannot be read: {error.strerror}") from error
    if len(content) > MAX_BYTES:
        raise UserError(f"--config {path} is larger than {MAX_BYTES >> 10} KiB: is it a configuration?")
    try:
        value = load_yaml(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8: {error.reason} at byte {error.start}") from error
    except UserError as error:
        raise UserError(f"{path} is {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} has to hold `key: value` lines, found {type(value).__name__}")
    return value
