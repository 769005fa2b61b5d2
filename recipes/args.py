"""Configuration of the stages: dataclasses, one YAML file, and flags that override it.

Every field is a flag and a YAML key of the same name. A key or flag that nobody reads is an error which names the
nearest valid one, so a typo never trains with a default.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import enum
import functools
import os
import sys
import types
import typing
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from reasonrec.tokenizers.errors import UserError


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; valid are {', '.join(sorted(known))}" if len(known) <= 40 else "; --help lists the valid ones"


def _fit(annotation: Any, value: Any) -> Any:
    """A YAML value as a field's type; numbers may be written as text, because YAML reads 1e-3 as text.

    Raises:
        TypeError: If it does not fit.
    """
    origin, options = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        for option in options:
            with contextlib.suppress(TypeError):
                return _fit(option, value)
        raise TypeError
    if origin is typing.Literal:
        if any(value == option and type(value) is type(option) for option in options):
            return value
        raise TypeError
    if origin is list and options and isinstance(value, list):
        return [_fit(options[0], element) for element in value]
    if origin is dict and options and isinstance(value, dict):
        return {_fit(options[0], key): _fit(options[1], element) for key, element in value.items()}
    if annotation in (int, float):
        try:
            number = annotation(value) if isinstance(value, str) else value
        except ValueError:
            raise TypeError from None
        if isinstance(number, bool) or not isinstance(number, int | annotation):
            raise TypeError
        return number
    kind = origin or annotation
    if isinstance(kind, type) and issubclass(kind, enum.Enum) and value in [member.value for member in kind]:
        return value
    if isinstance(kind, type) and isinstance(value, kind):
        return value
    raise TypeError


def _describe(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return "one of " + ", ".join(str(option) for option in typing.get_args(annotation))
    return annotation.__name__ if isinstance(annotation, type) and not typing.get_args(annotation) else str(annotation)


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


def _load_yaml(text: str) -> Any:
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
    path = Path(path)
    if not path.is_file():
        raise UserError(f"--config {path}: no such file")
    try:
        value = _load_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8: {error.reason} at byte {error.start}") from error
    except UserError as error:
        raise UserError(f"{path} is {error}") from error
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
    annotations = {name: hint for cls in classes for name, hint in typing.get_type_hints(cls).items()}
    parser = HfArgumentParser(list(classes), exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", help="YAML file with any of these values")
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    required = [name for name, action in actions.items() if action.required]
    for name, action in actions.items():
        if typing.get_origin(annotations.get(name)) is dict:
            action.type = functools.partial(_mapping, annotations[name])
    values = _read_config(_pop_config(argv), list(actions), annotations)
    for flag in (word.split("=", 1)[0] for word in argv if word.startswith("--")):
        name = flag[2:].replace("-", "_")
        if name not in actions and name != "help" and not _is_negation(name, list(actions)):
            raise UserError(f"unknown flag {flag}{_nearest(name, list(actions))}")
    if not {"-h", "--help"} & set(argv):  # the help shows defaults and what is required
        for action in parser._actions:  # what is not given is left to the dataclass or to the file
            action.default, action.required = argparse.SUPPRESS, False
    parser.error = _raise
    try:
        parsed, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error
    if rest:
        raise UserError(f"unexpected words on the command line: {' '.join(rest)}")
    values |= vars(parsed)
    missing = [name for name in required if name not in values]
    if missing:
        raise UserError(f"{missing[0]} is required: set it in the YAML file or pass --{missing[0]}")
    result = []
    for cls in classes:
        names = {f.name for f in fields(cls) if f.init}
        try:
            result.append(cls(**{name: value for name, value in values.items() if name in names}))
        except UserError:
            raise
        except ValueError as error:
            raise UserError(str(error)) from error
    return tuple(result)


def _read_config(path: str | None, known: Sequence[str], annotations: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the YAML file, each checked against its field."""
    values = {}
    for key, value in read_yaml(path).items() if path is not None else ():
        if key not in known:
            raise UserError(f"{path}: unknown key {key!r}{_nearest(str(key), known)}")
        try:
            values[key] = _fit(annotations[key], value)
        except TypeError:
            kind, expected = type(value).__name__, _describe(annotations[key])
            raise UserError(f"{path}: {key}={value!r} ({kind}) does not fit, expected {expected}") from None
    return values


def _mapping(annotation: Any, text: str) -> dict[str, Any]:
    """A mapping on the command line: `--tasks "{seqrec: 1, index2item: 0.2}"`."""
    try:
        return dict(_fit(annotation, _load_yaml(text)))
    except (TypeError, UserError):
        raise argparse.ArgumentTypeError(
            f"{text!r} does not fit, expected {_describe(annotation)}, written as '{{name: value, …}}'"
        ) from None


def _raise(message: str) -> typing.NoReturn:
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
            return _only(path, argv)
        if word.startswith("--config="):
            del argv[i]
            return _only(word.removeprefix("--config="), argv)
    return None


def _only(path: str, rest: Sequence[str]) -> str:
    if any(word == "--config" or word.startswith("--config=") for word in rest):
        raise UserError("--config was given twice: give one file, and flags for what differs from it")
    return path


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
