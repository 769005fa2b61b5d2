"""Configuration of the stages: dataclasses, one YAML file, and flags that override it.

Every field is a flag and a YAML key of the same name. A key or flag that nobody reads is an error which names the nearest
valid one, so a typo never trains with a default.
"""

from __future__ import annotations

import difflib
import functools
import os
import sys
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from reasonrec.tokenizers.errors import UserError


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid are {', '.join(sorted(known)[:40])}"


def _accepts(annotation: Any, value: Any) -> bool:
    """Whether a YAML value fits a field's annotation (strings are converted by the parser later)."""
    origin = typing.get_origin(annotation)
    if annotation is Any or isinstance(value, str):
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_accepts(option, value) for option in typing.get_args(annotation))
    if annotation is type(None):
        return value is None
    if origin is typing.Literal:
        return value in typing.get_args(annotation)
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    kind = origin or annotation
    return not isinstance(kind, type) or isinstance(value, kind)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        UserError: If the file is missing, is not YAML, or holds something else than a mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"--config {path}: no such file")
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} has to hold `key: value` lines, found {type(value).__name__}")
    return value


def parse(classes: Sequence[type], argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Parse `--config file.yaml` and flags into dataclasses.

    Args:
        classes: The stage's dataclasses, in the order of the result.
        argv: Command line, `sys.argv[1:]` by default. Flags override the file.

    Returns:
        One instance of each class.

    Raises:
        UserError: On an unknown key or flag, a missing required value or a value of the wrong type.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(list(classes), exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", help="YAML file with any of these values")
    known = [action.dest for action in parser._actions if action.dest not in ("help", "config")]
    annotations = {name: hint for cls in classes for name, hint in typing.get_type_hints(cls).items()}
    for action in parser._actions:
        if typing.get_origin(annotations.get(action.dest)) is dict:
            action.type = _mapping
    config_path = _pop_config(argv)
    if config_path is not None:
        config = read_yaml(config_path)
        for key, value in config.items():
            if key not in known:
                raise UserError(f"{config_path}: unknown key {key!r}{_nearest(str(key), known)}")
            if not _accepts(annotations.get(key, Any), value):
                expected = getattr(annotations[key], "__name__", None) or str(annotations[key])
                raise UserError(f"{config_path}: {key}={value!r} is a {type(value).__name__}, expected {expected}")
        for action in parser._actions:
            if action.dest in config:
                action.default = config[action.dest]
                action.required = False
    for flag in (word.split("=", 1)[0] for word in argv if word.startswith("--")):
        name = flag[2:]
        if name.replace("-", "_") not in known and name not in ("help", "config") and not _is_negation(name, known):
            raise UserError(f"unknown flag {flag}{_nearest(name, known)}")
    missing = [
        a.dest for a in parser._actions if a.required and not any(w.split("=")[0] == f"--{a.dest}" for w in argv)
    ]
    if missing and not {"-h", "--help"} & set(argv):
        raise UserError(f"{missing[0]} is required: set it in the YAML file or pass --{missing[0]}")
    parser.error = _raise  # type: ignore[method-assign]
    try:
        parsed, rest = parser.parse_known_args(argv)
    except Exception as error:
        if isinstance(error, UserError):
            raise
        raise UserError(str(error)) from error
    if rest:
        raise UserError(f"unexpected words on the command line: {' '.join(rest)}")
    # HfArgumentParser drops the defaults of list-valued flags (they come back as None): the class supplies its own.
    values = {name: value for name, value in vars(parsed).items() if value is not None}
    result = []
    for cls in classes:
        names = {f.name for f in fields(cls) if f.init}
        try:
            result.append(cls(**{name: values[name] for name in names if name in values}))
        except UserError:
            raise
        except ValueError as error:
            raise UserError(str(error)) from error
    return tuple(result)


def _mapping(text: str) -> dict[str, Any]:
    """A mapping on the command line: `--tasks "{seqrec: 1, index2item: 0.2}"`."""
    value = yaml.safe_load(text)
    if not isinstance(value, dict):
        raise UserError(f"{text!r} is no mapping; write it as '{{name: value, …}}'")
    return value


def _raise(message: str) -> None:
    raise UserError(message)


def _is_negation(name: str, known: Sequence[str]) -> bool:
    """HfArgumentParser adds `--no_x` for booleans that are on by default."""
    return name.startswith(("no_", "no-")) and name[3:].replace("-", "_") in known


def _pop_config(argv: list[str]) -> str | None:
    for i, word in enumerate(argv):
        if word == "--config":
            if i + 1 == len(argv):
                raise UserError("--config needs the path of a YAML file")
            path = argv[i + 1]
            del argv[i : i + 2]
            return path
        if word.startswith("--config="):
            del argv[i]
            return word.removeprefix("--config=")
    return None


def run(main: Callable[[], Any]) -> Callable[[], None]:
    """Run a stage's `main`: a user's mistake ends with one line on stderr and status 2, an interrupt with 130."""

    @functools.wraps(main)
    def guarded() -> None:
        try:
            main()
        except UserError as error:
            if os.environ.get("REASONREC_TRACEBACK"):
                raise
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            print("interrupted; run the same command again to go on", file=sys.stderr)
            raise SystemExit(130) from None

    return guarded
