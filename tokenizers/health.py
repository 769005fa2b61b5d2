"""How good an item index is before any model is trained on it: usage, collisions, meaning, behaviour, loss.

Bought items count: a collision between two items nobody buys costs nothing, one between best sellers is paid
on every recommendation. So collisions are also weighted by how often the items are training targets.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from reasonrec.tokenizers.index import ItemIndex
from reasonrec.tokenizers.terminal import visible

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
        What `health.json` holds: `levels`, `collisions`, `branching`, `agreement`, `behaviour` and, with
        embeddings, the share of variance that is left `unexplained` after each level.
    """
    report: dict[str, Any] = {
        "n_items": index.n_items,
        "level_sizes": list(index.level_sizes),
        "levels": [_level(index, level, train_count) for level in range(index.depth)],
        "collisions": _collisions(index, train_count),
        "branching": _branching(index),
        "agreement": _agreement(index, category, brand, seed),
    }
    if neighbours is not None:
        report["behaviour"] = _behaviour(index, *neighbours, seed)
    if embeddings is not None and reconstruct is not None:
        for level in report["levels"]:
            codes = index.codes[:, : level["level"] + 1]
            level["unexplained"] = unexplained(embeddings, reconstruct(codes))
    return report


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
    return "\n".join(lines)


def plot_report(report: dict[str, Any], index: ItemIndex, embeddings: np.ndarray | None, title: str) -> Any:
    """Draw the report.

    Args:
        report: What `health_report` returned.
        index: The index it describes.
        embeddings: float32 (items, dim), for the map of the items; None leaves it out.
        title: Heading.

    Returns:
        A matplotlib figure (its `savefig` writes it; no window or global state is involved).
    """
    from matplotlib.figure import Figure

    curves = report.get("training", {})
    figure = Figure(figsize=(18 if curves else 14, 7.5), layout="constrained")
    figure.suptitle(visible(title, 120), parse_math=False)  # a name may hold a dollar
    axes = figure.subplots(2, 4 if curves else 3)

    ax = axes[0, 0]
    for level in range(index.depth):
        counts = np.sort(np.bincount(index.codes[:, level], minlength=index.level_sizes[level]))[::-1]
        # Thinner from level to level: balanced levels lie on top of each other.
        width = 1 + 2 * (index.depth - level - 1)
        ax.plot(np.linspace(0, 100, len(counts)), counts, linewidth=width, label=f"level {level}")
    most = max(level["largest"] for level in report["levels"])
    ax.set(title="Items per code", xlabel="codes, most used first (%)", ylabel="items", ylim=(0, 1.3 * most))
    ax.legend()

    ax = axes[0, 1]
    sizes = report["collisions"]["group_sizes"]
    ax.bar(list(sizes), [size * n for size, n in sizes.items()], color=["C2" if s == 1 else "C3" for s in sizes])
    ax.set(
        title="Items by size of the group with equal codes",
        xlabel="group size (1: no collision)",
        ylabel="items",
    )

    ax = axes[0, 2]
    levels = np.arange(index.depth)
    ax.bar(levels - 0.27, [lv["size"] for lv in report["levels"]], 0.27, label="codes", color="C7")
    ax.bar(levels, [lv["perplexity"] for lv in report["levels"]], 0.27, label="perplexity, items")
    ax.bar(
        levels + 0.27,
        [lv["target_perplexity"] for lv in report["levels"]],
        0.27,
        label="perplexity, train targets",
    )
    ax.set(title="Use of the codes", xlabel="level", xticks=levels, ylim=(0, 1.4 * max(index.level_sizes[:-1])))
    ax.legend()

    ax = axes[1, 0]
    agreement = report["agreement"]
    names = ("purity", "purity_by_chance", "nmi", "nmi_by_chance")
    for i, name in enumerate(names):
        values = [p[name] for p in agreement["prefixes"]]
        ax.bar(np.arange(len(values)) + 0.2 * (i - 1.5), values, 0.2, label=name.replace("_", " "))
    ax.set(title=f"Agreement of prefixes with the {agreement['with'] or 'category (none known)'}", ylim=(0, 1))
    ax.set_xticks(range(len(agreement["prefixes"])), [f"prefix of {p['length']}" for p in agreement["prefixes"]])
    if agreement["prefixes"]:
        ax.legend()

    ax = axes[1, 1]
    left = [1.0, *(lv["unexplained"] for lv in report["levels"] if "unexplained" in lv)]
    ax.plot(range(len(left)), left, marker="o")
    ax.set(title="Variance left after each level", xlabel="levels", ylim=(0, 1.05), xticks=range(len(left)))

    ax = axes[1, 2]
    if embeddings is not None:
        points = _principal_plane(embeddings)
        ax.scatter(*points.T, c=index.codes[:, 0] % 20, cmap="tab20", s=4, linewidths=0)
        ax.set(title="Items on the two main axes, by first code", xticks=[], yticks=[])
    else:
        ax.set_axis_off()

    if curves:
        ax = axes[0, 3]
        for name in sorted(curves.keys() - {"step"}):
            ax.plot(curves["step"], curves[name], label=name)
        ax.set(title="Losses of the quantizer", xlabel="step", yscale="log")
        ax.legend()
        axes[1, 3].set_axis_off()
    return figure


def _principal_plane(embeddings: np.ndarray) -> np.ndarray:
    """Coordinates (items, 2) on the two directions of largest variance."""
    centred = (embeddings - embeddings.mean(0)).astype(np.float64)
    _, vectors = np.linalg.eigh(centred.T @ centred)
    return centred @ vectors[:, [-1, -2]]
