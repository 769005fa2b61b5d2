"""What a reader is, and which there are: chosen by name, each with options of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from reasonrec.data_gen.interaction_log import InteractionLog, LogOptions, build_tables
from reasonrec.data_gen.schema import Tables
from reasonrec.tokenizers.registry import Registry

MODULES = (
    "tables", "movielens", "amazon", "yelp", "steam", "complete_journey", "minionerec", "atomic", "lcrec",
    "sequence_text", "synthetic",
)  # fmt: skip

# Options that several readers have: one name means one thing, with one default.
FOLDER = {"help": "folder of a public data set; unset: the installed package, if it comes as one", "path": "name"}
DESCRIPTION_LENGTH = {"help": "cut longer descriptions", "at_least": 0}
MIN_RATING = {"help": "keep interactions rated at least this"}
MAX_BAD_LINES = {"help": "share of a file's lines that may be unreadable", "at_least": 0, "at_most": 1}
ITEM_TABLE = {"help": "CSV or Parquet: item_id, title (+ description, category, brand)", "path": "name"}
COLUMNS = {"help": "YAML only; our name: the file's name"}
WITH_REVIEWS = {"help": "keep what users wrote, of the training interactions only"}


class Reader(Protocol):
    """A source of data: a frozen dataclass whose fields are its options.

    Each is a key of `recipes/prepare.py`, which finds in the field's metadata its `help`, bounds of a number, and
    `path` for what names a file or a folder. What contradicts itself is refused in `__post_init__`.
    """

    def read(self) -> tuple[Tables, Mapping[str, Path]]:
        """Read the source: the dataset, and the raw files it came from by role."""


READERS: Registry[type[Reader]] = Registry("source", [f"reasonrec.data_gen.readers.{name}" for name in MODULES])


@dataclass(frozen=True)
class LogReader(LogOptions, ABC):
    """A reader of a log of interactions, which is filtered and split by the options that all logs have."""

    @abstractmethod
    def read_log(self) -> InteractionLog:
        """Read the log."""

    def read(self) -> tuple[Tables, Mapping[str, Path]]:
        """Read the log, filter and split it."""
        log = self.read_log()
        return build_tables(log, self), log.files
