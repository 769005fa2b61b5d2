"""Does a chain give the target away? What a retriever finds from the chain alone, and from the history alone.

Both get the same two retrievers: one compares words (TF-IDF of titles, categories and brands), one knows which items
are chosen together (co-visitation). A chain that says no more than its history can help a reader along, but a
retriever that reads it alone should not be ahead of one that reads the history alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import sparse

from reasonrec.data_gen.reasoning.traces import Trace, mentions, pieces
from reasonrec.data_gen.schema import Dataset
from reasonrec.recipes.evaluation.intervals import bootstrap_means, paired_difference
from reasonrec.recipes.rankers.baselines import CoVisitation, TrainLog
from reasonrec.recipes.rankers.top_k import top_k
from reasonrec.rewards.metrics import per_row

K = 10
RETRIEVERS = ("words", "items", "both")


def chain_items(trace: Trace) -> list[int]:
    """Items that a chain names, in the order of the history, each once."""
    named = {item for text in trace.stages.values() for item in mentions(text)}
    return list(dict.fromkeys(item for item in trace.history if item in named))


def chain_words(trace: Trace, titles: Sequence[str]) -> str:
    """A chain as it reads, with titles for items."""
    parts = (piece for text in trace.stages.values() for piece in [*pieces(text), "."])
    return " ".join(titles[piece] if isinstance(piece, int) else piece for piece in parts)


def leak_test(dataset: Dataset, traces: Sequence[Trace]) -> dict[str, Any] | None:
    """Compare what is found from the chains with what is found from the histories.

    Args:
        dataset: The dataset.
        traces: Traces of validation cases.

    Returns:
        HR@10 of every retriever given the chain and given the history, and their paired difference with a 95% interval
        over users, and how easy rows are whose formulation is right; None without traces.
    """
    if not traces:
        return None
    from sklearn.feature_extraction.text import TfidfVectorizer

    titles = dataset.items["title"].to_list()
    documents = [" ".join(parts) for parts in dataset.items.select("title", "category", "brand").iter_rows()]
    vectorizer = TfidfVectorizer(sublinear_tf=True).fit(documents)
    items = vectorizer.transform(documents)
    covisitation = CoVisitation(TrainLog.of(dataset), baskets=dataset.facts["order"] == "set")
    queries = {
        "chain": ([chain_words(t, titles) for t in traces], [chain_items(t) for t in traces]),
        "history": ([" ".join(documents[i] for i in t.history) for t in traces], [list(t.history) for t in traces]),
    }
    held_out = dataset.valid[[trace.row for trace in traces]]
    masked, users = held_out["masked"], held_out["user"].to_numpy()
    target = np.array([trace.target for trace in traces])
    popularity = dataset.items["train_count"].to_numpy()
    hits: dict[tuple[str, str], NDArray[np.float64]] = {}
    for source, (texts, named) in queries.items():
        scores = {"words": (vectorizer.transform(texts) @ items.T).toarray()}
        rows = pl.DataFrame({"history": pl.Series(named, dtype=pl.List(pl.Int32)), "masked": masked})
        scores["items"] = sparse.csr_array(covisitation.scores(rows)).toarray()
        scores["both"] = sum(_unit(scores[name]) for name in ("words", "items"))
        for name in RETRIEVERS:
            known = np.where(scores[name] > 0, scores[name], -np.inf)
            ranking = top_k(known, K, popularity, masked, fill=True)
            hits[name, source] = per_row(ranking, target, (K,))[f"hr@{K}"].astype(np.float64)
    result: dict[str, Any] = {"rows": len(traces), "metric": f"hr@{K}"}
    for name in RETRIEVERS:
        columns = np.stack([hits[name, source] for source in ("chain", "history")], axis=1)
        draws = bootstrap_means(users, columns)
        chain, history = columns.mean(axis=0)
        difference = paired_difference(draws[:, 0], draws[:, 1], chain - history)
        result[name] = {
            "chain": round(float(chain), 4),
            "history": round(float(history), 4),
            "difference": round(difference.value, 4),
            "ci95": [round(difference.low, 4), round(difference.high, 4)],
        }
    # How easy a row is for a retriever that never saw a chain, where the formulation is right and where it is not.
    right = np.array([bool(trace.hit) for trace in traces])
    easy = {"right": hits["items", "history"][right], "wrong": hits["items", "history"][~right]}
    result["history_by_formulation"] = {name: round(float(v.mean()), 4) for name, v in easy.items() if len(v)}
    result["chain_knows_more"] = any(result[name]["ci95"][0] > 0 for name in RETRIEVERS)
    return result


def _unit(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    return scores / np.maximum(scores.max(axis=1, keepdims=True), 1e-12)


def describe_leak(result: dict[str, Any] | None) -> str:
    """The comparison as lines for a person."""
    if result is None:
        return "  no validation traces: the leak test was not run"
    lines = [f"  {'HR@10 of a retriever given':<28} chain  history  difference"]
    for name in RETRIEVERS:
        row = result[name]
        low, high = row["ci95"]
        difference = f"{row['difference']:+.4f} [{low:+.4f}, {high:+.4f}]"
        lines.append(f"  {name:<28} {row['chain']:.4f} {row['history']:.4f}   {difference}")
    lines.append(f"  {'items given history, where the formulation is':<28} {result['history_by_formulation']}")
    if result["chain_knows_more"]:
        lines.append("  the chains find the target better than their histories do: they may give it away")
    return "\n".join(lines)
