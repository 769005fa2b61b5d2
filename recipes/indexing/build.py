"""What the index stage does between its configuration and its artefact: codes and the health report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from reasonrec.data_gen.schema import Dataset
from reasonrec.recipes.indexing.collaboration import embeddings_for
from reasonrec.recipes.indexing.item_vectors import item_embeddings
from reasonrec.recipes.rankers.baselines import TrainLog
from reasonrec.tokenizers.artefact import write_json
from reasonrec.tokenizers.health import health_report
from reasonrec.tokenizers.health_plot import plot_report
from reasonrec.tokenizers.index import ItemIndex, build_index, external_index, save_quantizer
from reasonrec.tokenizers.quantizers.base import Quantizer
from reasonrec.tokenizers.quantizers.reassigned import Reassigned

if TYPE_CHECKING:
    from reasonrec.recipes.index_items import IndexConfig


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
        embeddings, tried, says = embeddings_for(
            dataset,
            item_embeddings(config, dataset),
            config.collaboration,
            quantizer,
            config.codebook_sizes,
            seed=config.seed,
        )
        index = build_index(quantizer.fit_encode(embeddings), config.codebook_sizes)
        save_quantizer(folder, quantizer, embeddings, says)
        dealt = quantizer.report if isinstance(quantizer, Reassigned) else {}
        more = {"collaboration": tried, "reassigned": dealt, "training": quantizer.curves}
    index.save(folder)
    report = measure(index, dataset, embeddings, quantizer, config.seed)
    report |= {name: value for name, value in more.items() if value}
    write_json(folder / "health.json", report)
    heading = f"{dataset.facts.get('name', dataset.path)}: {config.quantizer}, sizes {list(index.level_sizes)}"
    plot_report(report, index, embeddings, heading).savefig(folder / "health.png", dpi=110)
    return index, report
