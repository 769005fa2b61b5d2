"""Reading YAML, with messages that fit on one line."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from reasonrec.tokenizers.environment import expand_home
from reasonrec.tokenizers.errors import UserError


class _OnceLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice, of which all but the last would be read by nobody."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping."""
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} is given twice", problem_mark=key_node.start_mark)
            seen.add(key if isinstance(key, Hashable) else None)
        return super().construct_mapping(node, deep)


def load_yaml(text: str) -> Any:
    """Read YAML.

    Raises:
        UserError: If it is none; says where on one line.
    """
    try:
        return yaml.load(text, _OnceLoader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise UserError(f"not valid YAML: {line}{error.problem}") from error
    except yaml.YAMLError as error:
        raise UserError(f"not valid YAML: {' '.join(str(error).split())}") from error


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        UserError: If the file is missing, is not YAML, or holds something else than a mapping.
    """
    path = Path(expand_home(str(path), "--config"))
    if not path.is_file():
        raise UserError(f"--config {path}: no such file")
    try:
        value = load_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8: {error.reason} at byte {error.start}") from error
    except UserError as error:
        raise UserError(f"{path} is {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} has to hold `key: value` lines, found {type(value).__name__}")
    return value
