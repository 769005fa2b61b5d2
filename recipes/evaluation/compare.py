"""Measuring the rows of a table: rankings in, the content of `metrics.json` out.

Every row is measured on the same cases by the same code and with the same resampled users, so its
differences to other rows are paired. Whether a row may be said to beat another one is decided here and
nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from reasonrec.data_gen.schema import Dataset
from reasonrec.recipes.evaluation.intervals import DRAWS, bootstrap_means, holm, paired_difference, percentile_interval
from reasonrec.recipes.evaluation.slices import DESCRIPTIONS, slices
from reasonrec.rewards import metrics as measures
from reasonrec.tokenizers.errors import UserError

BASELINE, CONTROL, DIRECT, REASONING = "baseline", "control", "direct", "reasoning"
NO_WORSE_MARGIN = 0.005


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        name: Unique name; for searched lists it says how (beam width, or exhaustive).
        mode: `baseline`, `direct`, `reasoning`, or `control` (a check that is neither baseline nor claim).
        ranking: Items (cases, K), best first, -1 where a list is shorter.
        seconds_per_user: Time to rank one case, where it was measured.
        tokens_per_user: Tokens generated for one case, those of its chains; 0 where nothing but items is written.
        note: What a reader has to know about it, such as a tuned value.
    """

    name: str
    mode: str
    ranking: NDArray[np.integer]
    seconds_per_user: float | None = None
    note: str = ""
    tokens_per_user: float = 0.0


def evaluate_rows(
    dataset: Dataset,
    split: Literal["valid", "test"],
    rows: Sequence[Row],
    ks: Sequence[int] = (1, 5, 10, 20),
    claims: Sequence[tuple[str, str]] = (),
    *,
    sid_of_item: ArrayLike | None = None,
    cases: pl.DataFrame | None = None,
    candidates: int | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure rankings: metrics with intervals, slices, and paired differences.

    Each row whose mode is neither `baseline` nor `control` is compared with the best baseline of the table,
    by HR and by NDCG at the main cut-off (10, if it is among `ks`); the best baseline is the one with the
    highest value on this split, which favours the baseline.

    Args:
        dataset: The dataset.
        split: Which held-out cases were ranked.
        rows: Rows of the table; every ranking has one line per case and at least max(ks) places.
        ks: Cut-offs.
        claims: Further pairs of row names (a, b), tested as a − b.
        sid_of_item: Number of each item's semantic ID (n_items,), for a second column that counts IDs.
        cases: The held-out rows that were ranked, if it was only a part of the split.
        candidates: How many items were ranked, if not all: those that are cold.
        draws: Bootstrap resamples.
        seed: Seed of the resamples.

    Returns:
        The content of `metrics.json`.

    Raises:
        UserError: If names repeat, a claim names no row, or a ranking has the wrong shape.
    """
    cases = dataset.rows(split) if cases is None else cases
    _check(rows, claims, cases.height, max(ks))
    main = 10 if 10 in ks else max(ks)
    users, target = cases["user"].to_numpy(), cases["target"].to_numpy()
    measured = [measures.per_row(row.ranking, target, ks) for row in rows]
    names = list(measured[0])
    values = np.stack([one[name] for one in measured for name in names], axis=1)  # (cases, rows × metrics)
    means = values.mean(axis=0).reshape(len(rows), len(names))
    drawn = bootstrap_means(users, values, draws=draws, seed=seed).reshape(draws, len(rows), len(names))
    table = []
    for i, row in enumerate(rows):
        entry = {
            "name": row.name,
            "mode": row.mode,
            "note": row.note,
            "metrics": dict(zip(names, means[i].tolist(), strict=True)),
            "ci95": {name: list(percentile_interval(drawn[:, i, j])) for j, name in enumerate(names)},
            "coverage": measures.coverage(row.ranking, dataset.n_items, main),
            "valid_ratio": measures.valid_ratio(row.ranking, dataset.n_items, cases["masked"]),
            "seconds_per_user": row.seconds_per_user,
            "tokens_per_user": row.tokens_per_user,
        }
        if sid_of_item is not None:
            entry["sid_metrics"] = _sid_metrics(row.ranking, target, sid_of_item, ks)
        table.append(entry)
    parts = {name: where for name, where in slices(cases, dataset).items() if 0 < where.sum() < cases.height}
    main_names = [f"hr@{main}", f"ndcg@{main}"]
    for name, where in parts.items():
        _add_slice(table, name, where, users, values, [names.index(m) for m in main_names], names, draws, seed)
    best = {metric: _best_baseline(table, metric) for metric in main_names}
    paired = []
    for metric, i, j, difference in _paired(rows, claims, best, means, drawn, names):
        paired.append({"a": rows[i].name, "b": rows[j].name, "metric": metric, **difference})
        if metric.startswith("hr@"):
            paired[-1]["overlap"] = overlap(measured[i][metric], measured[j][metric])
    corrected = holm([pair["p"] for pair in paired])
    for pair, p_holm in zip(paired, corrected, strict=True):
        pair["p_holm"] = p_holm
    return _plain(
        {
            "rows": table,
            "paired": paired,
            "best_baseline": best,
            "slices": {n: {"n": int(w.sum()), "description": DESCRIPTIONS.get(n, "")} for n, w in parts.items()},
            "dataset": dict(dataset.facts),
            "split": split,
            "n_rows": cases.height,
            "n_users": len(np.unique(users)),
            "protocol": _protocol(dataset, cases, split, candidates, ks, main, draws, seed, sid_of_item is not None),
        }
    )


def overlap(a: NDArray[np.floating], b: NDArray[np.floating]) -> dict[str, float]:
    """How far two rows find the same targets, which is what bounds a fusion of them.

    Args:
        a: Hits of one row (cases,).
        b: Hits of the other (cases,).

    Returns:
        `jaccard`, the share of the cases that both hit among those that either hits, and `either`, the share of the
        cases that either hits: the hit rate of whoever always knew which of the two to ask.
    """
    both, either = float(((a > 0) & (b > 0)).mean()), float(((a > 0) | (b > 0)).mean())
    return {"jaccard": both / either if either else 0.0, "either": either}


def verdict(low: float, high: float) -> str:
    """What a paired interval allows to say: `beats`, `behind`, `no worse` (margin .005) or `undecided`."""
    if low > 0:
        return "beats"
    if high < 0:
        return "behind"
    return "no worse" if low > -NO_WORSE_MARGIN else "undecided"


def _check(rows: Sequence[Row], claims: Sequence[tuple[str, str]], height: int, longest: int) -> None:
    names = [row.name for row in rows]
    if not rows or height == 0:
        raise UserError(f"{len(rows)} rows for {height} held-out cases: there is nothing to evaluate")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two rows are called {name!r}: names have to be unique")
    for name in (name for pair in claims for name in pair):
        if name not in names:
            raise UserError(f"a claim names {name!r}, which is no row; rows are {', '.join(names)}")
    for row in rows:
        shape = np.shape(row.ranking)
        if len(shape) != 2 or shape[0] != height or shape[1] < longest:
            raise UserError(
                f"the ranking of {row.name!r} has shape {shape}, needed is ({height}, {longest} or more); "
                f"rank more items, or lower the cut-offs"
            )


def _sid_metrics(
    ranking: NDArray[np.integer], target: NDArray[np.integer], sid_of_item: ArrayLike, ks: Sequence[int]
) -> dict[str, float]:
    """HR and NDCG on semantic IDs: lists of k items, duplicates merged, then matched."""
    result = {}
    for k in ks:
        sids, wanted = measures.to_sid_level(ranking[:, :k], target, sid_of_item)
        found = measures.per_row(sids, wanted, (k,))
        result.update({name: float(found[name].mean()) for name in (f"hr@{k}", f"ndcg@{k}")})
    return result


def _add_slice(
    table: list[dict[str, Any]],
    name: str,
    where: NDArray[np.bool_],
    users: NDArray[np.integer],
    values: NDArray[np.float64],
    chosen: Sequence[int],
    names: Sequence[str],
    draws: int,
    seed: int,
) -> None:
    columns = values.reshape(len(values), len(table), len(names))[:, :, list(chosen)]
    flat = columns.reshape(len(values), -1)
    drawn = bootstrap_means(users, flat, where=where, draws=draws, seed=seed)
    drawn = drawn.reshape(draws, len(table), len(chosen))
    for i, entry in enumerate(table):
        part: dict[str, Any] = {"n": int(where.sum())}
        for j, column in enumerate(chosen):
            part[names[column]] = float(columns[where, i, j].mean())
            part[f"{names[column]}_ci95"] = list(percentile_interval(drawn[:, i, j]))
        entry.setdefault("slices", {})[name] = part


def _paired(
    rows: Sequence[Row],
    claims: Sequence[tuple[str, str]],
    best: Mapping[str, str | None],
    means: NDArray[np.float64],
    drawn: NDArray[np.float64],
    names: Sequence[str],
) -> Iterator[tuple[str, int, int, dict[str, Any]]]:
    """Models against the best baseline of each metric, then the claims: metric, both rows, difference."""
    position = {row.name: i for i, row in enumerate(rows)}
    models = [row.name for row in rows if row.mode not in (BASELINE, CONTROL)]
    for metric, baseline in best.items():
        m = names.index(metric)
        against_best = [] if baseline is None else [(model, baseline) for model in models]
        for a, b in dict.fromkeys([*against_best, *claims]):
            i, j = position[a], position[b]
            value = float(means[i, m] - means[j, m])
            found = paired_difference(drawn[:, i, m], drawn[:, j, m], value)
            yield (
                metric,
                i,
                j,
                {
                    "difference": value,
                    "ci95": [found.low, found.high],
                    "p": found.p,
                    "mde": found.mde,
                    "verdict": verdict(found.low, found.high),
                },
            )


def _best_baseline(table: Sequence[Mapping[str, Any]], metric: str) -> str | None:
    baselines = [row for row in table if row["mode"] == BASELINE]
    return max(baselines, key=lambda row: row["metrics"][metric])["name"] if baselines else None


def _protocol(
    dataset: Dataset,
    cases: pl.DataFrame,
    split: str,
    candidates: int | None,
    ks: Sequence[int],
    main: int,
    draws: int,
    seed: int,
    sid: bool,
) -> dict[str, Any]:
    """How the table was made, and what a reader must not conclude from it."""
    facts, same = dataset.facts, float(cases["same_time"].to_numpy().mean())
    notes = []
    if facts.get("split") == "leave_one_out":
        notes.append("Leave-one-out: other users' futures visible in training; a time split would be harder.")
    if same > 0.05:
        notes.append(f"{same:.0%} of the targets carry the timestamp of their predecessor: see the slice 'same time'.")
    if facts.get("mask_history"):
        notes.append("Items the user already has are masked in every row of the table, models and baselines alike.")
    if split == "valid":
        notes.append("Validation cases: whatever was tuned or stopped on them looks better than it is.")
    if cases.height < dataset.rows("valid" if split == "valid" else "test").height:
        notes.append(f"Only {cases.height:,} cases of the split were ranked.")
    if candidates is not None:
        notes.append(
            f"Ranked are the {candidates:,} items that occur in no train sequence, for the cases they answer."
        )
    if sid:
        notes.append("SID columns count semantic IDs (lists of k items, duplicates merged), for papers that do so.")
    return {
        "candidates": "full catalogue, item level" if candidates is None else "items that occur in no train sequence",
        "n_candidates": dataset.n_items if candidates is None else candidates,
        "ties": "score, then train popularity, then item number; items without a score after those with one",
        "history_masked": bool(facts.get("mask_history")),
        "main_k": main,
        "ks": list(ks),
        "bootstrap": {"unit": "users", "draws": draws, "seed": seed, "level": 0.95},
        "best_baseline_by": "its value on this split, which favours the baseline",
        "correction": "Holm over all paired differences of the table",
        "no_worse_margin": NO_WORSE_MARGIN,
        "dataset_hash": dataset.manifest.hash,
        # A note of the dataset that says the same as one above is said once.
        "notes": [
            *notes,
            *(n for n in map(str, facts.get("notes", [])) if not any(n in one for one in notes)),
        ],
    }


def _plain(value: Any) -> Any:
    """JSON has no NaN: numbers that do not exist become null."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value
