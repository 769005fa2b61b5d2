"""Registries: what a user chooses by name. An entry stands beside its implementation; a miss names the nearest."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any, Generic, TypeVar

from reasonrec.tokenizers.errors import UserError

T = TypeVar("T")


def closest(name: str, known: Collection[str]) -> str | None:
    """Which of the known names is probably meant by one that is not known; None if none is like it."""
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.5)), None)


def nearest(name: str, known: Collection[str], otherwise: str | None = None) -> str:
    """The end of a message about a name that is not known: the nearest, or what to say where none is near.

    Args:
        name: The name.
        known: Those that are known.
        otherwise: What to say where none is near; all of them by default.
    """
    close = closest(name, known)
    if close is not None:
        return f"; did you mean {close!r}?"
    return otherwise if otherwise is not None else f"; valid are {', '.join(sorted(known))}" if known else ""


def check_options(what: str, options: Collection[str], known: Collection[str]) -> None:
    """Check the options that a user gives to what was chosen by name.

    Args:
        what: What was chosen, such as `the quantizer balanced`.
        options: Names of the options that were given.
        known: Names of those it has.

    Raises:
        UserError: If it does not have one of them; the message names all it has.
    """
    for option in options:
        if option not in known:
            raise UserError(f"{what} has no option {option!r}; it has {', '.join(known) or 'none'}")


class Registry(Generic[T]):
    """Entries by their names.

    Args:
        what: What is chosen, for messages.
        modules: Modules whose entries register themselves on import; they are imported when somebody looks. Entries
            stand in the order of their modules, those of other modules behind them.
    """

    def __init__(self, what: str, modules: Sequence[str]) -> None:
        self.what, self.modules = what, tuple(modules)
        self._entries: dict[str, tuple[T, str]] = {}

    def add(self, name: str, entry: T, module: str, *, replace: bool = False) -> None:
        """Make an entry known.

        Args:
            name: Its name.
            entry: The entry.
            module: Module that it stands in (`__name__`).
            replace: The name may be taken; whoever had it is forgotten.

        Raises:
            ValueError: If the name is taken.
        """
        if name in self._entries and not replace:
            raise ValueError(f"two entries are called {name!r} as {self.what}")
        self._entries[name] = entry, module

    def registered(self, name: str) -> T | None:
        """The entry of a name, if a module that was imported so far has one: modules ask this while they register."""
        return self._entries[name][0] if name in self._entries else None

    def entries(self) -> dict[str, T]:
        """All entries."""
        for module in self.modules:
            importlib.import_module(module)
        place = {module: number for number, module in enumerate(self.modules)}
        order = sorted(self._entries, key=lambda name: place.get(self._entries[name][1], len(place)))
        return {name: self._entries[name][0] for name in order}

    def find(self, name: str) -> T:
        """The entry of a name.

        Raises:
            UserError: If there is none; the message names the nearest, and all.
        """
        found = self.entries()
        if name not in found:
            raise UserError(f"{self.what} {name!r} is unknown{self.nearest(name)}")
        return found[name]

    def make(self, name: str, options: Mapping[str, Any], **given: Any) -> Any:
        """What an entry makes, which is a dataclass whose fields are its options.

        Args:
            name: Name of the entry.
            options: What the user chose.
            **given: Fields that are not the user's to choose.

        Raises:
            UserError: If there is no such entry, or it has no such option, or refuses a value.
        """
        kind: Any = self.find(name)
        known = [item.name for item in fields(kind) if item.init and item.name not in given]
        check_options(f"the {self.what} {name}", options, known)
        return kind(**given, **options)

    def nearest(self, name: str) -> str:
        """The end of a message about a name that is not known: the nearest, and all."""
        names = list(self.entries())
        close = closest(name, names)
        hint = f" (did you mean {close!r}?)" if close else ""
        return f"{hint}; known are {', '.join(names)}"
