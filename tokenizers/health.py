"""How good an item index is before any model is trained on it: usage, collisions, meaning, behaviour, loss.

Bought items count: a collision between two items nobody buys costs nothing, one between best sellers is paid
on every recommendation. So collisions are also weighted by how often the items are training targets.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from reasonrec.tokenizers.health_verdicts import Verdict, verdicts
from reasonrec.tokenizers.index import ItemIndex

# Where the first of several categories ends: "Action, Comedy", "Tools > Drills", "Drama|War".
_SEPARATOR = re.compile(r"\s*(?:,|;|\||>|/ )\s*")


def first_category(category: str) -> str:
    """The first of the categories that a text lists."""
    return _SEPARATOR.split(category.strip(), maxsplit=1)[0]


def health_report(
    index: ItemIndex,
    *,
    train_count: np.ndarray,
    category: Sequence[str],
    brand: Sequence[str],
    neighbours: tuple[np.ndarray, np.ndarray] | None = None,
    embeddings: np.ndarray | None = None,
    reconstruct: Callable[[np.ndarray], np.ndarray] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure an index.

    Args:
        index: The index.
        train_count: (items,) how often each item is a training target (train rows only).
        category: Category of each item, "" where unknown.
        brand: Brand of each item; takes the category's place if no item has one.
        neighbours: (pairs,) items, and (pairs,) the items that follow them in train histories.
        embeddings: float32 (items, dim); with `reconstruct` gives the reconstruction error. Imported indexes
            have none.
        reconstruct: Embeddings of the first levels' codes (items, up to depth), as a quantizer's.
        seed: Seed of the shuffle that gives the chance level of the agreement.

    Returns:
        What `health.json` holds: `levels`, `collisions`, `dependence`, `branching`, `agreement`, `behaviour`,
        `verdicts` and, with embeddings, the share of variance that is left `unexplained` after each level.
    """
    report: dict[str, Any] = {
        "n_items": index.n_items,
        "level_sizes": list(index.level_sizes),
        "levels": [_level(index, level, train_count) for level in range(index.depth)],
        "collisions": _collisions(index, train_count),
        "dependence": _dependence(index, seed),
        "branching": _branching(index),
        "agreement": _agreement(index, category, brand, seed),
    }
    if neighbours is not None:
        report["behaviour"] = _behaviour(index, *neighbours, seed)
    if embeddings is not None and reconstruct is not None:
        for level in report["levels"]:
            codes = index.codes[:, : level["level"] + 1]
            level["unexplained"] = unexplained(embeddings, reconstruct(codes))
    return report | {"verdicts": verdicts(report)}


def _level(index: ItemIndex, level: int, train_count: np.ndarray) -> dict[str, Any]:
    size = index.level_sizes[level]
    items = np.bincount(index.codes[:, level], minlength=size)
    targets = np.bincount(index.codes[:, level], weights=train_count, minlength=size)
    return {
        "level": level,
        "size": size,
        "used": int((items > 0).sum()),
        "utilisation": float((items > 0).mean()),
        "perplexity": _perplexity(items),
        # Far below `perplexity` where a few codes carry most purchases.
        "target_perplexity": _perplexity(targets),
        "smallest": int(items.min()),
        "largest": int(items.max()),
    }


def _perplexity(counts: np.ndarray) -> float:
    """Exponential of the entropy: how many equally used codes would be as diverse; 0 without counts."""
    total = counts.sum()
    if total == 0:
        return 0.0
    share = counts[counts > 0] / total
    return float(np.exp(-(share * np.log(share)).sum()))


def _collisions(index: ItemIndex, train_count: np.ndarray) -> dict[str, Any]:
    _, group, count = np.unique(index.codes[:, :-1], axis=0, return_inverse=True, return_counts=True)
    colliding = count[group.reshape(-1)] > 1
    targets = int(train_count.sum())
    return {
        "distinct": len(count),
        "groups": int((count > 1).sum()),
        "items": int(colliding.sum()),
        "item_share": float(colliding.mean()),
        "target_share": float(train_count[colliding].sum() / targets) if targets else None,
        "largest_group": int(count.max()),
        "group_sizes": {int(size): int(n) for size, n in zip(*np.unique(count, return_counts=True), strict=True)},
    }


def _dependence(index: ItemIndex, seed: int) -> list[dict[str, Any]]:
    """Mutual information of each two codebooks in nats, beside a shuffle's: parallel ones should share little."""
    pairs = []
    for first in range(index.depth):
        shuffled = np.random.default_rng(seed).permutation(index.codes[:, first])
        for second in range(first + 1, index.depth):
            other = index.codes[:, second]
            pairs.append({
                "levels": [first, second],
                "information": mutual_information(index.codes[:, first], other),
                "information_by_chance": mutual_information(shuffled, other),
            })  # fmt: skip
    return pairs


def _branching(index: ItemIndex) -> list[dict[str, Any]]:
    """For each level: prefixes up to it, and how many children they have on the next (leaves left out)."""
    stats = []
    for level in range(index.depth):
        prefixes = np.unique(index.codes[:, : level + 1], axis=0)
        below = np.unique(index.codes[:, : level + 2], axis=0)
        below = below[below[:, -1] >= 0]
        parents, children = np.unique(below[:, :-1], axis=0, return_counts=True)
        stats.append({
            "level": level,
            "prefixes": len(prefixes),
            "parents": len(parents),
            "mean_children": float(children.mean()) if len(children) else 0.0,
            "max_children": int(children.max()) if len(children) else 0,
        })  # fmt: skip
    return stats


def _agreement(index: ItemIndex, category: Sequence[str], brand: Sequence[str], seed: int) -> dict[str, Any]:
    """Purity and normalised mutual information of prefixes with the first category, beside a shuffle's."""
    from sklearn.metrics import normalized_mutual_info_score

    labels, source = np.array([first_category(text) for text in category]), "category"
    if not (labels != "").any():
        labels, source = np.array([text.strip() for text in brand]), "brand"
    known = np.flatnonzero(labels != "")
    if not len(known):
        return {"with": None, "prefixes": []}
    _, label = np.unique(labels[known], return_inverse=True)
    shuffled = np.random.default_rng(seed).permutation(label)
    prefixes = []
    for length in range(1, min(2, index.depth) + 1):
        _, prefix = np.unique(index.codes[known, :length], axis=0, return_inverse=True)
        prefix = prefix.reshape(-1)
        prefixes.append({
            "length": length,
            "purity": _purity(prefix, label),
            "purity_by_chance": _purity(prefix, shuffled),
            "nmi": float(normalized_mutual_info_score(label, prefix)),
            "nmi_by_chance": float(normalized_mutual_info_score(shuffled, prefix)),
        })  # fmt: skip
    return {"with": source, "labels": int(label.max()) + 1, "items": len(known), "prefixes": prefixes}


def _behaviour(index: ItemIndex, first: np.ndarray, second: np.ndarray, seed: int) -> dict[str, Any]:
    """Whether items that follow each other share codes: what a model can learn from codes, before it is
    trained.

    A pair of one item with itself says nothing about the codes and is left out.
    """
    different = first != second
    first, second = first[different], second[different]
    if not len(first):
        return {"pairs": 0, "prefixes": []}
    shuffled = np.random.default_rng(seed).permutation(second)
    prefixes = []
    for length in range(1, min(2, index.depth) + 1):
        _, prefix = np.unique(index.codes[:, :length], axis=0, return_inverse=True)
        a, b, c = (prefix.reshape(-1)[items] for items in (first, second, shuffled))
        shared, by_chance = float((a == b).mean()), float((a == c).mean())
        prefixes.append({
            "length": length,
            "shared": shared,
            "lift": shared / by_chance if by_chance else 0.0,
            # With many prefixes and few pairs most of it is chance, hence the shuffle beside it.
            "information": mutual_information(a, b),
            "information_by_chance": mutual_information(a, c),
        })  # fmt: skip
    return {"pairs": len(first), "prefixes": prefixes}


def mutual_information(a: np.ndarray, b: np.ndarray) -> float:
    """Mutual information of two labels, in nats."""
    joint = np.unique(a * (int(b.max()) + 1) + b, return_counts=True)[1]
    entropies = [np.log(_perplexity(counts)) for counts in (np.bincount(a), np.bincount(b), joint)]
    return float(entropies[0] + entropies[1] - entropies[2])


def _purity(prefix: np.ndarray, label: np.ndarray) -> float:
    """Share of items that carry the most frequent label of their prefix."""
    pairs, counts = np.unique(np.stack([prefix, label], axis=1), axis=0, return_counts=True)
    most = np.zeros(int(prefix.max()) + 1, dtype=np.int64)
    np.maximum.at(most, pairs[:, 0], counts)
    return float(most.sum() / len(label))


def unexplained(embeddings: np.ndarray, rebuilt: np.ndarray) -> float:
    """Share of the embeddings' variance that is left: 1 for no code at all, 0 for a perfect one."""
    variance = float(np.square(embeddings - embeddings.mean(0)).sum(dtype=np.float64))
    return float(np.square(embeddings - rebuilt).sum(dtype=np.float64)) / variance if variance else 0.0


def format_report(report: dict[str, Any]) -> str:
    """The report as a short table for the terminal."""
    columns = ("level", "codes", "used", "perplexity", "items/code", "prefixes", "unexplained")
    lines = ["  " + "".join(f"{name:>13}" for name in columns)]
    for level, branch in zip(report["levels"], report["branching"], strict=True):
        left = f"{level['unexplained']:.1%}" if "unexplained" in level else "-"
        members = f"{level['smallest']}-{level['largest']}"
        cells = (level["level"], level["size"], level["used"], f"{level['perplexity']:.1f}", members)
        lines.append("  " + "".join(f"{cell:>13}" for cell in (*cells, branch["prefixes"], left)))
    c = report["collisions"]
    share = "-" if c["target_share"] is None else f"{c['target_share']:.1%}"
    lines.append(
        f"  collisions before disambiguation: {c['items']:,} of {report['n_items']:,} items "
        f"({c['item_share']:.1%}) in {c['groups']:,} groups, the largest of {c['largest_group']}; {share} of "
        "training targets"
    )
    if pairs := report.get("dependence"):
        mean, chance = (sum(pair[name] for pair in pairs) / len(pairs) for name in list(pairs[0])[1:])
        lines.append(
            f"  two codebooks share {mean:.3f} nats of information on average (chance {chance:.3f}, of up to "
            f"{min(np.log(level['perplexity']) for level in report['levels']):.3f})"
        )
    if dealt := report.get("reassigned"):
        lines.append(
            f"  reassigned: {dealt['items']:,} items have another last code than the quantizer gave, in "
            f"{dealt['groups']:,} groups; squared error {dealt['growth']:+.1%}"
        )
    a = report["agreement"]
    for p in a["prefixes"]:
        lines.append(
            f"  prefix of {p['length']} against the {a['with']} ({a['labels']:,} of them): "
            f"purity {p['purity']:.3f} (chance {p['purity_by_chance']:.3f}), "
            f"NMI {p['nmi']:.3f} (chance {p['nmi_by_chance']:.3f})"
        )
    for p in report.get("behaviour", {}).get("prefixes", []):
        lines.append(
            f"  prefix of {p['length']} shared by neighbours in a history: {p['shared']:.3f} of them, "
            f"{p['lift']:.1f} times chance; mutual information of the codes {p['information']:.3f} nats "
            f"(chance {p['information_by_chance']:.3f})"
        )
    lines += [f"  {Verdict(**verdict)}" for verdict in report["verdicts"]]
    return "\n".join(lines)
