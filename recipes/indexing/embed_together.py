"""Processes of one launch that embed items together: each takes its shards, and the first one does all else."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from reasonrec.data_gen.schema import Dataset
from reasonrec.recipes.policies.sharing import this_launch
from reasonrec.tokenizers.embed import locate_model
from reasonrec.tokenizers.output import disk_full_is_clear, resume_folder
from reasonrec.tokenizers.shards import Shards

if TYPE_CHECKING:
    from reasonrec.recipes.index_items import IndexConfig


def agreed(config: IndexConfig, *, go: bool = False) -> bool:
    """Whether items are to be embedded, as the first process says; to be called once by each, before that.

    Args:
        config: Configuration of the stage.
        go: What the first process says.
    """
    if config.quantizer == "external" or config.embeddings_from is not None:
        return False
    if _processes() == 1:
        return go
    from accelerate.utils import broadcast_object_list

    this_launch(timedelta(days=7))  # where others go on from more shards, one of them waits for long
    (said,) = broadcast_object_list([go])
    return bool(said)


def help_out(config: IndexConfig) -> None:
    """What the other processes do.

    Raises:
        UserError: If the dataset or the encoder cannot be read, or the disk is full.
    """
    from reasonrec.recipes.indexing.item_vectors import item_embeddings  # PyTorch

    if agreed(config):
        with disk_full_is_clear(Path(config.output_dir)):
            item_embeddings(config, Dataset.load(config.dataset))


def device_of(config: IndexConfig) -> str | None:
    """Where this process embeds: each on a GPU of its own, if there are some."""
    from reasonrec.recipes.models.precision import default_device  # PyTorch

    return str(default_device()) if config.device is None and _processes() > 1 else config.device


def shards_of(config: IndexConfig) -> Shards:
    """The shards of this run, beside what an interrupted training would go on from."""
    from reasonrec.recipes.models.precision import choose  # PyTorch

    place = Path(locate_model(config.embedding_model))
    files = sorted(place.rglob("*")) if place.is_dir() else []
    about = repr((
        config.embedding_model, [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files],
        config.max_tokens, config.batch_size, choose(config.precision, config.device).name,
    ))  # fmt: skip
    folder, size = resume_folder(Path(config.output_dir)), _processes()
    if size == 1:
        return Shards(folder, about)
    state = this_launch()
    return Shards(folder, about, state.process_index, size, state.wait_for_everyone)


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
