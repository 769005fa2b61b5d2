"""Rank the full catalogue for every held-out case: trained models, their controls and all baselines in one table.

accelerate launch recipes/eval_ranking.py --config recipes/configs/demo/eval.yaml

Writes `metrics.json` and a self-contained `report.html`.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import torch
from accelerate import PartialState

from reasonrec.data_gen.schema import Dataset
from reasonrec.recipes import baselines, sasrec
from reasonrec.recipes.args import parse, run
from reasonrec.recipes.comparison import CONTROL, Row, evaluate_rows
from reasonrec.recipes.recommender import Recommender
from reasonrec.recipes.report import examples, print_table, write_report
from reasonrec.tokenizers.artefact import check_output, staged
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.index import external_sids


@dataclass
class EvalConfig:
    """Configuration of the evaluation."""

    dataset: str = field(metadata={"help": "dataset folder (prepare.py)"})
    output_dir: str = field(metadata={"help": "folder of the report"})
    models: list[str] = field(default_factory=list, metadata={"help": "folders of trained models (sft.py)"})
    split: Literal["valid", "test"] = field(default="test", metadata={"help": "which held-out cases"})
    num_beams: int = field(default=50, metadata={"help": "width of the item search"})
    exhaustive: bool = field(
        default=False, metadata={"help": "score the whole catalogue instead of searching it; for small ones"}
    )
    batch_size: int = field(default=16, metadata={"help": "cases searched at a time; changes time, not results"})
    control: bool = field(default=True, metadata={"help": "also rank with another user's history"})
    baselines: bool = field(default=True, metadata={"help": "the counting baselines"})
    window: int = field(default=10, metadata={"help": "co-visitation: pairs at most so far apart"})
    sasrec_trials: int = field(
        default=0, metadata={"help": "SASRec configurations tried on validation; 0 leaves it out"}
    )
    sid_file: str | None = field(
        default=None, metadata={"help": "published semantic IDs (JSON) for a column that counts IDs"}
    )
    max_rows: int | None = field(default=None, metadata={"help": "evaluate a seeded sample of the cases"})
    dtype: Literal["bfloat16", "float32"] = field(default="bfloat16", metadata={"help": "dtype of the models"})
    device: str | None = field(
        default=None, metadata={"help": "device of the models; the accelerator if there is one"}
    )
    seed: int = field(default=0, metadata={"help": "seed of bootstrap, sample and controls"})
    overwrite: bool = field(default=False, metadata={"help": "move an existing output_dir aside"})

    def __post_init__(self) -> None:
        if self.num_beams < max(KS):
            raise UserError(f"num_beams={self.num_beams} has to be at least {max(KS)}, the longest list reported")
        if not (self.models or self.baselines or self.sasrec_trials):
            raise UserError("nothing to evaluate: give models, or leave baselines on")


KS = (1, 5, 10, 20)


def other_histories(cases: pl.DataFrame, seed: int) -> list[list[int]]:
    """For each case the history of another user, of similar length where possible.

    Within each group of similarly long histories the users are shifted by one in a random order, so that nobody keeps
    their own (a group with one user takes the nearest group's).

    Args:
        cases: Held-out rows.
        seed: Seed of the order.
    """
    rng = np.random.default_rng(seed)
    lengths = cases["history"].list.len().to_numpy()
    users = cases["user"].to_numpy()
    histories = cases["history"].to_list()
    # Sorted by length with random ties: a neighbour in this order is another user with a history as long as can be.
    order = np.lexsort([rng.random(len(lengths)), lengths])
    result: list[list[int]] = [[] for _ in histories]
    for place, i in enumerate(order):
        for step in range(1, len(order)):
            j = order[(place + step) % len(order)] if place + step < len(order) else order[len(order) - 1 - step]
            if users[j] != users[i]:
                result[i] = histories[j]
                break
    return result


def _timed(name: str, mode: str, note: str, rank: Callable[[], np.ndarray], n: int) -> Row:
    begin = time.perf_counter()
    ranking = rank()
    return Row(name, mode, ranking, seconds_per_user=(time.perf_counter() - begin) / max(n, 1), note=note)


def baseline_rows(config: EvalConfig, dataset: Dataset, cases: pl.DataFrame) -> list[Row]:
    """Rank with the counting baselines, and with SASRec tuned on validation."""
    rows = []
    if config.baselines:
        for baseline, note in baselines.standard(dataset, window=config.window):
            rank = functools.partial(baseline.rank, cases, max(KS))
            rows.append(_timed(baseline.name, "baseline", note, rank, cases.height))
    if config.sasrec_trials:
        model, tried = sasrec.tune(dataset, config.sasrec_trials, sasrec.SasrecConfig(seed=config.seed))
        note = f"best of {len(tried)} configurations on validation"
        rows.append(_timed("SASRec", "baseline", note, lambda: model.rank(cases, max(KS)), cases.height))
    return rows


def model_rows(
    config: EvalConfig, dataset: Dataset, cases: pl.DataFrame, path: str
) -> tuple[list[Row], list[tuple[str, str]]]:
    """Rank with a trained model, and with the same model given another user's history."""
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    recommender = Recommender.load(path, dataset=config.dataset, dtype=dtype, device=config.device)
    if recommender.bundle.dataset.manifest.hash != dataset.manifest.hash:
        raise UserError(f"{path} belongs to another dataset than {config.dataset}")
    exact = config.exhaustive or config.num_beams >= dataset.n_items
    name = f"{Path(path).name}, {'exhaustive' if exact else f'beam {config.num_beams}'}"
    masked = cases["masked"].to_list()
    exclude = masked if any(masked) else None

    def rank(histories: list[list[int]]) -> np.ndarray:
        return recommender.recommend(
            histories,
            k=max(KS),
            num_beams=config.num_beams,
            exhaustive=config.exhaustive,
            exclude=exclude,
            batch_size=config.batch_size,
            progress=True,
        )[0]

    note = f"{recommender.setting.base_model}, {recommender.setting.method}"
    rows = [_timed(name, "direct", note, lambda: rank(cases["history"].to_list()), cases.height)]
    claims = []
    if config.control:
        other = f"{Path(path).name}, another user's history"
        rows.append(_timed(other, CONTROL, note, lambda: rank(other_histories(cases, config.seed)), cases.height))
        claims.append((name, other))
    if config.baselines:
        claims.append((name, "popularity"))
    return rows, claims


def main() -> None:
    """Parse, rank, compare, report."""
    (config,) = parse([EvalConfig])
    if not PartialState().is_main_process:  # ranking is not distributed
        return
    check_output(config.output_dir, overwrite=config.overwrite)
    dataset = Dataset.load(config.dataset)
    cases = dataset.rows(config.split)
    if config.max_rows and config.max_rows < cases.height:
        cases = cases.sample(config.max_rows, seed=config.seed).sort("row")
    rows: list[Row] = []
    claims: list[tuple[str, str]] = []
    for path in config.models:
        more, more_claims = model_rows(config, dataset, cases, path)
        rows, claims = rows + more, claims + more_claims
    rows = baseline_rows(config, dataset, cases) + rows
    sids = external_sids(config.sid_file, dataset.n_items) if config.sid_file else None
    metrics = evaluate_rows(dataset, config.split, rows, KS, claims, sid_of_item=sids, cases=cases, seed=config.seed)
    shown = [row for row in rows if row.mode == "direct"] or rows[:1]
    with staged(
        config.output_dir,
        kind="report",
        config=asdict(config),
        seed=config.seed,
        inputs={"dataset": dataset.manifest.hash},
        overwrite=config.overwrite,
    ) as (folder, _):
        write_report(folder, metrics, examples=examples(dataset, config.split, shown, cases=cases))
    print_table(metrics)
    print(f"\n{config.output_dir}/report.html shows the same with plots")


if __name__ == "__main__":
    run(main)()
