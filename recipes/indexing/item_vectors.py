"""Vectors of items for their codes: of a text encoder, or of an index that has them already."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from reasonrec.data_gen.schema import ITEM_TEXT, Dataset
from reasonrec.recipes.indexing.embed_together import device_of, shards_of
from reasonrec.recipes.keys import recorded
from reasonrec.tokenizers.artefact import check_input, read_manifest
from reasonrec.tokenizers.embed import JOINED, embed_items, with_joined
from reasonrec.tokenizers.environment import is_first_process
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.index import REMEDY, load_embeddings
from reasonrec.tokenizers.shards import Shards

if TYPE_CHECKING:
    from reasonrec.recipes.index_items import IndexConfig

# What decides the embeddings; they may be taken from another index only where all of it agrees.
TEXT_KEYS = ("embedding_model", "max_tokens", *(f"{name}_weight" for name in (JOINED, *ITEM_TEXT)))


def text_embeddings(config: IndexConfig, items: pl.DataFrame, shards: Shards | None = None) -> np.ndarray:
    """float32 (items, dim) of the encoder, possibly by several processes together."""
    from reasonrec.recipes.models.precision import of_encoder  # PyTorch

    device = device_of(config) if shards is not None else config.device
    fields = with_joined({name: items[name].to_list() for name in ITEM_TEXT})
    return embed_items(
        fields,
        {name: getattr(config, f"{name}_weight") for name in fields},
        config.embedding_model,
        batch_size=config.batch_size,
        device=device,
        compute=of_encoder(config.precision, device),
        max_tokens=config.max_tokens,
        progress=is_first_process(),
        trust_remote_code=config.trust_remote_code,
        shards=shards,
    )


def item_embeddings(config: IndexConfig, dataset: Dataset) -> np.ndarray:
    """float32 (items, dim): of the encoder, or of another index of the same dataset and text settings.

    Raises:
        UserError: If that index belongs to another dataset or was made with other text settings.
    """
    if config.embeddings_from is None:
        return text_embeddings(config, dataset.items, shards_of(config))
    made = read_manifest(config.embeddings_from, "index")
    check_input(made, "dataset", dataset.manifest, REMEDY)
    # A folder of the encoder is as seen from there; company came later than text, and is not in its vectors.
    mine = recorded(config, config.embeddings_from) | {"collaboration": 0.0}
    theirs = {"collaboration": 0.0} | made.config
    for key in (*TEXT_KEYS, "collaboration"):
        if (made_with := theirs.get(key)) != mine[key]:
            raise UserError(
                f"embeddings_from={config.embeddings_from} was made with {key}={made_with!r}, not {mine[key]!r}: name "
                "an index that has it so, or leave embeddings_from out"
            )
    return load_embeddings(config.embeddings_from)
