"""Configuration of the stages: dataclasses, one YAML file, and flags that override it.

Every field is a flag and a YAML key of the same name. A key or flag that nobody reads is an error which names the
nearest valid one, so a typo never trains with a default.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import select
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING
from typing import Any, TypeVar

from reasonrec.recipes.keys import Key, KeyTable, OptionsOf, describe, fit, keys_of, nearest, read_words
from reasonrec.recipes.next_stage import next_commands
from reasonrec.recipes.quiet import quiet
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.output import finished_outputs, kept_of, unfinished_outputs
from reasonrec.tokenizers.terminal import say
from reasonrec.tokenizers.yaml_files import read_yaml

_T = TypeVar("_T")
_HELP = ("-h", "--help", "--help-all", "--help_all")


def parse(parts: Sequence[type | KeyTable | OptionsOf], argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Parse `--config file.yaml` and flags.

    Args:
        parts: What has keys, in the order of the result: dataclasses, tables of the keys of classes that take long to
            import, or the options of what a key before them chooses.
        argv: Command line, `sys.argv[1:]` by default. Flags override the file.

    Returns:
        An instance of each dataclass, and of the chosen one of options; for a table the values that were given, for
        `build`.

    Raises:
        UserError: On an unknown key or flag, a missing required value, or a value of the wrong type or out of range.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    keys = [(part, key) for part in parts for key in (keys_of(part) if isinstance(part, type) else part.keys)]
    known = {name: key for _, key in keys for name in (key.name, *key.aliases)}
    refused = {name: why for part in parts if isinstance(part, KeyTable) for name, why in part.refused.items()}
    if set(_HELP) & set(argv):
        _print_help([key for _, key in keys], everything=not {"-h", "--help"} & set(argv))
        raise SystemExit(0)
    flags = _read_flags(argv, known, refused)
    values = _read_config(flags.pop("config", None), known, refused) | flags
    for part, key in keys:
        if key.name in values:
            values[key.name] = key.checked(values[key.name])
        elif key.default is MISSING and not isinstance(part, OptionsOf):
            raise UserError(f"{key.name} is required: set it in the YAML file or pass --{key.name}")
    result = []
    for part in parts:
        cls = part.chosen(values) if isinstance(part, OptionsOf) else part
        own_keys = cls.keys if isinstance(cls, KeyTable) else keys_of(cls)
        own = {key.name: values[key.name] for key in own_keys if key.name in values}
        result.append(own if isinstance(cls, KeyTable) else build(cls, own))
    return tuple(result)


def build(cls: type[_T], values: Mapping[str, Any]) -> _T:
    """Make a configuration of values from `parse`.

    Raises:
        UserError: If the class refuses them.
    """
    try:
        return cls(**values)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(" ".join(str(error).split())) from error


def _read_flags(argv: Sequence[str], known: Mapping[str, Key], refused: Mapping[str, str]) -> dict[str, Any]:
    """The values on the command line, by the names of their keys; `config` is the path of the file."""
    names = sorted({key.name for key in known.values()})
    values: dict[str, Any] = {}
    for flag, words in _split(argv):
        name = flag[2:].replace("-", "_")
        positive = name.removeprefix("no_")
        if name == "config":
            values["config"] = _config_path(words, "config" in values)
        elif name in known:
            key = known[name]
            values[key.name] = read_words(key, words)
        elif positive != name and positive in known and known[positive].takes(bool):
            if words:
                raise UserError(f"unexpected words on the command line: {' '.join(words)}")
            values[known[positive].name] = False
        elif name in refused or positive in refused:
            name = name if name in refused else positive
            raise UserError(f"{flag} is not supported here: {refused[name]}")
        else:
            raise UserError(f"unknown flag {flag}{nearest(name, names)}")
    return values


def _split(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Flags, each with the words behind it."""
    groups: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            groups.append((flag, [value] if equals else []))
        elif not groups:
            raise UserError(f"unexpected words on the command line: {word}")
        else:
            groups[-1][1].append(word)
    return groups


def _config_path(words: Sequence[str], again: bool) -> str:
    if again:
        raise UserError("--config was given twice: give one file, and flags for what differs from it")
    if not words:
        raise UserError("--config needs the path of a YAML file")
    if len(words) > 1:
        raise UserError(f"unexpected words on the command line: {' '.join(words[1:])}")
    return words[0]


def _read_config(path: str | None, known: Mapping[str, Key], refused: Mapping[str, str]) -> dict[str, Any]:
    """The values of the YAML file, each checked against the type of its key."""
    values: dict[str, Any] = {}
    for name, value in read_yaml(path).items() if path is not None else ():
        if name in refused:
            raise UserError(f"{path}: {name} is not supported here: {refused[name]}")
        if name not in known:
            names = sorted({key.name for key in known.values()})
            raise UserError(f"{path}: unknown key {name!r}{nearest(str(name), names)}")
        key = known[name]
        if key.name in values:
            raise UserError(f"{path}: {key.name} is given twice, once as {', '.join(key.aliases)}")
        try:
            values[key.name] = fit(key.annotation, value)
        except TypeError:
            kind, expected = type(value).__name__, describe(key.annotation)
            raise UserError(f"{path}: {name}={value!r} ({kind}) does not fit, expected {expected}") from None
    return values


def _print_help(keys: Sequence[Key], *, everything: bool) -> None:
    others = sum(not key.own for key in keys)
    more = f"--help-all shows {others} more keys, of TRL and transformers, such as --learning_rate."
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--config FILE] [--key value ...]",
        epilog=more if others and not everything else None,
        add_help=False,
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=32),
    )
    general = parser.add_argument_group("options")
    general.add_argument("-h", "--help", action="store_true", help="show the keys of this stage")
    if others:
        general.add_argument("--help-all", action="store_true", help="show the keys of TRL and transformers as well")
    general.add_argument("--config", metavar="FILE", help="YAML file with any of these keys; flags override it")
    for title, own in (("keys of this stage", True), ("keys of TRL and transformers", False)):
        group = parser.add_argument_group(title)
        for key in keys:
            if key.own == own and (own or everything):
                default = "required" if key.default is MISSING else f"default: {key.default}"
                text = f"{key.help} ({default})".lstrip().replace("%", "%%")
                group.add_argument(f"--{key.name}", metavar=key.metavar, help=text)
    parser.print_help()


def run(main: Callable[[], Any]) -> Callable[[], None]:
    """Run a stage's `main`, and name the command that goes on from what it wrote.

    A user's mistake ends with one line on stderr and status 2, Ctrl-C (status 130) and SIGTERM (143) with what was
    kept and the command that takes it up again, and a reader of stdout that leaves ends it in silence (141).
    """

    @functools.wraps(main)
    def guarded() -> None:
        command, before = list(sys.argv), len(finished_outputs())
        try:
            with quiet(), _terminable():
                main()
                for out in finished_outputs()[before:]:
                    for line in next_commands(out, command[1:]):
                        say(f"next: {line}")
        except UserError as error:
            if os.environ.get("REASONREC_TRACEBACK"):
                raise
            say(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt as stop:
            say(_interrupted(command), file=sys.stderr)
            raise SystemExit(143 if isinstance(stop, _Terminated) else 130) from None
        except BrokenPipeError:
            if not _reader_left():
                raise
            raise SystemExit(141) from None  # as a program that SIGPIPE ends

    return guarded


def _reader_left() -> bool:
    """Whether nobody reads stdout any more (`reasonrec --help | head -1`); what is still to be written is dropped."""
    watched = select.poll()
    watched.register(sys.stdout.fileno(), 0)
    left = bool(watched.poll(0))  # errors are reported without being asked for
    if left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
    return left


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which a scheduler sends before it kills: the same as Ctrl-C."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupted(argv: Sequence[str]) -> str:
    """What was kept of the outputs that were being written, and the command that goes on."""
    kept = [line for out in unfinished_outputs() for line in kept_of(out)] or ["nothing is unfinished"]
    script, *words = argv
    launched = "accelerate launch" if "ACCELERATE_MIXED_PRECISION" in os.environ else "python"
    begin = script if script.startswith("reasonrec ") else f"{launched} {shlex.quote(script)}"
    return f"interrupted: {'; '.join(kept)}; the same command goes on: {begin} {shlex.join(words)}".rstrip()
