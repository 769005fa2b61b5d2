"""A key of a configuration: its type, its default, its help, and the rule that its values follow.

The keys of a stage are the fields of its dataclass. What a field's type does not say stands in its metadata:

    k: int = field(default=10, metadata={"help": "items to recommend", "at_least": 1})

Rules are `at_least`, `above`, `at_most` and `below` (a bound of a number, of each number in a list, of each value of a
mapping), `one_of` (a registry that has to have an entry of that name) and `path`: a leading `~` is the home folder,
and an artefact made with it keeps the path relative to itself, or its last name only (`"path": "name"`) where no later
stage follows it. No number may be NaN, infinite or an integer beyond 64 bits, and no text may hold what no file can: a
NUL, or half a character.
"""

from __future__ import annotations

import contextlib
import enum
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from reasonrec.tokenizers.environment import expand_home
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.places import place
from reasonrec.tokenizers.registry import Registry
from reasonrec.tokenizers.registry import nearest as nearest_of
from reasonrec.tokenizers.terminal import shown
from reasonrec.tokenizers.whole import INT64
from reasonrec.tokenizers.whole import MAX_SEED as MAX_SEED
from reasonrec.tokenizers.yaml_files import load_yaml

_BOUNDS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "at_least": ("at least", lambda value, bound: value >= bound),
    "above": ("above", lambda value, bound: value > bound),
    "at_most": ("at most", lambda value, bound: value <= bound),
    "below": ("below", lambda value, bound: value < bound),
}
RULES = frozenset({*_BOUNDS, "one_of", "path"})
# A key of every stage that loads a model; `models/precision.py` decides by it.
PrecisionName = typing.Literal["auto", "bf16", "fp16", "fp32"]
TRUST_HELP = "run code that comes with a model; nothing in a folder turns this on"
PRECISION_HELP = "what is computed in: auto (what the hardware is fast in), bf16, fp16 or fp32"
_YES, _NO = ("true", "yes", "t", "y", "1", "on"), ("false", "no", "f", "n", "0", "off")


@dataclass(frozen=True)
class Key:
    """One key.

    Attributes:
        name: Its name in a file; `--name` is the flag.
        annotation: Its type.
        default: Its default; `MISSING` if it has to be given.
        help: What it does.
        rules: What its values follow, see above.
        own: Whether it is the kit's; those of a library are shown by `--help-all` only.
        aliases: Older names that are still understood.
    """

    name: str
    annotation: Any
    default: Any = MISSING
    help: str = ""
    rules: Mapping[str, Any] = field(default_factory=dict)
    own: bool = True
    aliases: tuple[str, ...] = ()

    @property
    def options(self) -> tuple[Any, ...]:
        """The types that its value may have."""
        if typing.get_origin(self.annotation) in (typing.Union, types.UnionType):
            return typing.get_args(self.annotation)
        return (self.annotation,)

    @property
    def metavar(self) -> str:
        """What stands behind its flag in the help."""
        kinds = [option for option in self.options if option is not type(None)]
        choices = [choice for option in kinds for choice in _choices(option)]
        if "one_of" in self.rules:
            choices = list(self.rules["one_of"].entries())
        if choices:
            return "{" + ",".join(choices) + "}" if len(choices) <= 16 else "NAME"
        return "|".join(map(describe, kinds))

    def takes(self, kind: type) -> bool:
        """Whether a value may be of that kind, such as `list`."""
        return any(typing.get_origin(option) is kind or option is kind for option in self.options)

    def checked(self, value: Any) -> Any:
        """The value with its paths written out.

        Raises:
            UserError: If it breaks a rule.
        """
        self._check(self.name, value)
        return self._expand(value) if self.rules.get("path") else value

    def _expand(self, value: Any) -> Any:
        if isinstance(value, str):
            return expand_home(value, self.name)
        if isinstance(value, list):
            return [self._expand(element) for element in value]
        if isinstance(value, dict):
            return {self._expand(name): element for name, element in value.items()}
        return value

    def _check(self, name: str, value: Any) -> None:
        if isinstance(value, list | dict):
            for place, element in value.items() if isinstance(value, dict) else enumerate(value):
                self._check(f"{name}[{place}]", element)
                if isinstance(place, str):
                    _check_text(f"a name in {name}", place)
        if isinstance(value, str):
            _check_text(name, value)
            if "one_of" in self.rules:
                self.rules["one_of"].find(value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return
        if isinstance(value, int) and abs(value) > INT64:
            raise UserError(f"{name}={shown(value)} has to be a number of 64 bits, {INT64} at most")
        if not math.isfinite(value):
            raise UserError(f"{name}={value} has to be a finite number")
        for rule, (words, holds) in _BOUNDS.items():
            if rule in self.rules and not holds(value, self.rules[rule]):
                raise UserError(f"{name}={value} has to be {words} {self.rules[rule]}")


def _check_text(name: str, text: str) -> None:
    # A byte of the command line that is no UTF-8 is half a character in Python.
    if "\x00" in text or (not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)):
        raise UserError(f"{name}={shown(text)} has to be text in UTF-8 without NUL: rename what is called like that")


@dataclass(frozen=True)
class KeyTable:
    """Keys of a class that is too slow to import before the command line is read.

    Attributes:
        keys: Its keys.
        refused: Its other keys, each with what to do instead.
    """

    keys: tuple[Key, ...]
    refused: Mapping[str, str]


def keys_of(cls: type) -> list[Key]:
    """The keys of a stage's dataclass."""
    annotations = typing.get_type_hints(cls)
    keys = []
    for item in fields(cls):
        if not item.init:
            continue
        default = item.default if item.default_factory is MISSING else item.default_factory()
        rules = {name: value for name, value in item.metadata.items() if name in RULES}
        keys.append(Key(item.name, annotations[item.name], default, item.metadata.get("help", ""), rules))
    return keys


@dataclass(frozen=True)
class OptionsOf:
    """Keys of what another key chooses: those of all that can be chosen are offered, those of the chosen one are read.

    Attributes:
        chooser: The key that chooses, of a part that stands before.
        registry: What can be chosen: dataclasses whose fields are keys.
    """

    chooser: str
    registry: Registry[Any]

    @property
    def keys(self) -> tuple[Key, ...]:
        """The keys of all.

        Raises:
            ValueError: If two have different keys of one name: a flag is read before it is known who is chosen.
        """
        found: dict[str, Key] = {}
        for name, cls in self.registry.entries().items():
            for key in keys_of(cls):
                if found.setdefault(key.name, key) != key:
                    raise ValueError(f"{self.chooser} {name}: the key {key.name} is declared otherwise elsewhere")
        return tuple(found.values())

    def chosen(self, values: Mapping[str, Any]) -> type:
        """The dataclass that is chosen.

        Args:
            values: The values that were given, that of `chooser` among them.

        Raises:
            UserError: If a key is set that it does not read, or one is not that it cannot do without.
        """
        cls: type = self.registry.find(values[self.chooser])
        chosen, own = f"{self.chooser}: {values[self.chooser]}", {key.name: key for key in keys_of(cls)}
        for key in self.keys:
            if key.name not in own and values.get(key.name, key.default) != key.default:
                raise UserError(
                    f"{key.name}={values[key.name]!r} is not read with {chosen}; remove it "
                    f"(read are {', '.join(sorted(own))})"
                )
            if key.name in own and key.default is MISSING and key.name not in values:
                raise UserError(f"{chosen} needs {key.name}: set it in the YAML file or pass --{key.name}")
        return cls


def recorded(stage: Any, out: str | Path) -> dict[str, Any]:
    """The configuration of a stage as its artefact keeps it: no path as it is on this machine.

    Args:
        stage: The stage's dataclass.
        out: Folder of the finished artefact.
    """

    def kept(rule: Any, value: Any) -> Any:
        if isinstance(value, str):
            return Path(value).name if rule == "name" else place(value, out)
        if isinstance(value, list):
            return [kept(rule, element) for element in value]
        return {kept(rule, name): element for name, element in value.items()} if isinstance(value, dict) else value

    rules = {key.name: key.rules.get("path") for key in keys_of(type(stage))}
    return {name: kept(rules.get(name), value) if rules.get(name) else value for name, value in asdict(stage).items()}


def nearest(name: str, known: Sequence[str]) -> str:
    """The end of a message about a name that is not known, among few or the hundreds of a training."""
    return nearest_of(name, known, "; --help-all lists the valid ones" if len(known) > 40 else None)


def describe(annotation: Any) -> str:
    """A type in words."""
    if typing.get_origin(annotation) is typing.Literal:
        return "one of " + ", ".join(str(option) for option in typing.get_args(annotation))
    return annotation.__name__ if isinstance(annotation, type) and not typing.get_args(annotation) else str(annotation)


def fit(annotation: Any, value: Any) -> Any:
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
                return fit(option, value)
        raise TypeError
    if origin is typing.Literal:
        if value is False and "no" in options:  # YAML reads `no` as false
            return "no"
        if any(value == option and type(value) is type(option) for option in options):
            return value
        raise TypeError
    if origin is list and options and isinstance(value, list):
        return [fit(options[0], element) for element in value]
    if origin is dict and options and isinstance(value, dict):
        return {fit(options[0], key): fit(options[1], element) for key, element in value.items()}
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


def read_words(key: Key, words: Sequence[str]) -> Any:
    """The words behind a flag as the key's value.

    A list may be written `16 16`, `16,16` or `"[16, 16]"`; a mapping `"{a: 1, b: 2}"`; a flag alone is true.

    Raises:
        UserError: If they do not fit.
    """
    flag = f"argument --{key.name}"
    if not words:
        if key.takes(bool):
            return True
        raise UserError(f"{flag}: expected {'at least ' if key.takes(list) else ''}one argument")
    text = " ".join(words)
    if key.takes(list) and (not key.takes(str) or len(words) > 1 or text.startswith("[") or "," in text):
        return _read_list(key, words)
    if len(words) > 1:
        raise UserError(f"unexpected words on the command line: {' '.join(words[1:])}")
    if type(None) in key.options and str not in key.options and text.lower() in ("none", "null"):
        return None
    for option in key.options:
        if option is not type(None):
            with contextlib.suppress(TypeError):
                return _read_word(option, text)
    raise UserError(f"{flag}: {_misfit(key, text)}")


def _read_list(key: Key, words: Sequence[str]) -> list[Any]:
    kind = next(option for option in key.options if typing.get_origin(option) is list or option is list)
    text = " ".join(words)
    try:
        if text.startswith("["):
            return list(fit(kind, _yaml(text)))
        elements = [part.strip() for word in words for part in word.split(",") if part.strip()]
        (element,) = typing.get_args(kind) or (str,)
        return [_read_word(element, part) for part in elements]
    except TypeError:
        raise UserError(
            f"argument --{key.name}: {text!r} does not fit, expected {describe(kind)}, written as 'a b', 'a,b' or "
            "'[a, b]'"
        ) from None


def _read_word(annotation: Any, text: str) -> Any:
    if annotation is bool:
        if text.lower() in (*_YES, *_NO):
            return text.lower() in _YES
        raise TypeError
    if annotation is dict or typing.get_origin(annotation) is dict:
        return fit(annotation, _yaml(text))
    if annotation is str or annotation is Any:
        return text
    return fit(annotation, text)


def _yaml(text: str) -> Any:
    try:
        return load_yaml(text)
    except UserError:
        raise TypeError from None


def _misfit(key: Key, text: str) -> str:
    """Why a word does not fit."""
    kinds = [option for option in key.options if option is not type(None)]
    choices = [choice for option in kinds for choice in _choices(option)]
    if choices:
        among = f" (choose from {', '.join(choices)})" if len(choices) <= 16 else nearest(text, choices)
        return f"invalid choice: {text!r}{among}"
    if key.takes(dict):
        return f"{text!r} does not fit, expected {describe(key.annotation)}, written as '{{name: value, …}}'"
    if key.takes(bool):
        return f"{text!r} is neither true nor false"
    return f"invalid {' or '.join(map(describe, kinds))} value: {text!r}"


def _choices(annotation: Any) -> list[str]:
    if typing.get_origin(annotation) is typing.Literal:
        return [str(option) for option in typing.get_args(annotation)]
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return [str(member.value) for member in annotation]
    return []
