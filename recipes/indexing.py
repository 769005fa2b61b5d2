"""What the index stage does between its configuration and its artefact: embeddings, codes, the health report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from reasonrec.data_gen.schema import ITEM_TEXT, Dataset
from reasonrec.recipes.collaboration import embeddings_for
from reasonrec.recipes.keys import recorded
from reasonrec.recipes.models.precision import of_encoder
from reasonrec.recipes.rankers.baselines import TrainLog
from reasonrec.tokenizers.artefact import check_input, read_manifest, write_json
from reasonrec.tokenizers.embed import JOINED, embed_items, with_joined
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.health import health_report, plot_report
from reasonrec.tokenizers.index import REMEDY, ItemIndex, build_index, external_index, load_embeddings, save_quantizer
from reasonrec.tokenizers.quantizers.base import Quantizer
from reasonrec.tokenizers.quantizers.reassigned import Reassigned

if TYPE_CHECKING:
    from reasonrec.recipes.index_items import IndexConfig

# What decides the embeddings; they may be taken from another index only where all of it agrees.
_TEXT_KEYS = ("embedding_model", "max_tokens", *(f"{name}_weight" for name in (JOINED, *ITEM_TEXT)))


def item_embeddings(config: IndexConfig, dataset: Dataset) -> np.ndarray:
    """float32 (items, dim): of the encoder, or of another index of the same dataset and text settings.

    Raises:
        UserError: If that index belongs to another dataset or was made with other text settings.
    """
    if config.embeddings_from is None:
        fields = with_joined({name: dataset.items[name].to_list() for name in ITEM_TEXT})
        weights = {name: getattr(config, f"{name}_weight") for name in fields}
        return embed_items(
            fields,
            weights,
            config.embedding_model,
            batch_size=config.batch_size,
            device=config.device,
            compute=of_encoder(config.precision, config.device),
            max_tokens=config.max_tokens,
            trust_remote_code=config.trust_remote_code,
        )
    made = read_manifest(config.embeddings_from, "index")
    check_input(made, "dataset", dataset.manifest, REMEDY)
    # A folder of the encoder is as seen from there; company came later than text, and is not in its vectors.
    mine = recorded(config, config.embeddings_from) | {"collaboration": 0.0}
    theirs = {"collaboration": 0.0} | made.config
    for key in (*_TEXT_KEYS, "collaboration"):
        if (made_with := theirs.get(key)) != mine[key]:
            raise UserError(
                f"embeddings_from={config.embeddings_from} was made with {key}={made_with!r}, not {mine[key]!r}: name "
                "an index that has it so, or leave embeddings_from out"
            )
    return load_embeddings(config.embeddings_from)


def measure(
    index: ItemIndex, dataset: Dataset, embeddings: np.ndarray | None, quantizer: Quantizer | None, seed: int
) -> dict[str, Any]:
    """The health report of an index of a dataset; an imported one has neither embeddings nor quantizer."""
    return health_report(
        index,
        train_count=dataset.items["train_count"].to_numpy(),
        category=dataset.items["category"].to_list(),
        brand=dataset.items["brand"].to_list(),
        neighbours=TrainLog.of(dataset).pairs(1),
        embeddings=embeddings,
        reconstruct=quantizer.reconstruct if quantizer is not None else None,
        seed=seed,
    )


def build(config: IndexConfig, dataset: Dataset, folder: Path) -> tuple[ItemIndex, dict[str, object]]:
    """Make the index and its health report, and write everything but the manifest."""
    embeddings: np.ndarray | None = None
    quantizer: Quantizer | None = None
    more: dict[str, Any] = {}
    if config.external_index is not None:
        index = external_index(config.external_index, dataset.n_items)
    else:
        quantizer = config.build_quantizer()
        embeddings, tried = embeddings_for(
            dataset,
            item_embeddings(config, dataset),
            config.collaboration,
            quantizer,
            config.codebook_sizes,
            seed=config.seed,
        )
        index = build_index(quantizer.fit_encode(embeddings), config.codebook_sizes)
        save_quantizer(folder, quantizer, embeddings)
        dealt = quantizer.report if isinstance(quantizer, Reassigned) else {}
        more = {"collaboration": tried, "reassigned": dealt, "training": quantizer.curves}
    index.save(folder)
    report = measure(index, dataset, embeddings, quantizer, config.seed)
    report |= {name: value for name, value in more.items() if value}
    write_json(folder / "health.json", report)
    heading = f"{dataset.facts.get('name', dataset.path)}: {config.quantizer}, sizes {list(index.level_sizes)}"
    plot_report(report, index, embeddings, heading).savefig(folder / "health.png", dpi=110)
    return index, report
