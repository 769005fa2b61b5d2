"""A health report as a picture, every panel with what its numbers mean."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np

from reasonrec.tokenizers.health_verdicts import Verdict
from reasonrec.tokenizers.index import ItemIndex
from reasonrec.tokenizers.terminal import visible

COLOURS = {"good": "darkgreen", "acceptable": "black", "change": "firebrick"}


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
    from matplotlib.ticker import MaxNLocator

    verdicts = {found["about"]: Verdict(**found) for found in report["verdicts"]}

    def heading(name: str, about: str) -> dict[str, Any]:
        """The title of a panel, above what its numbers mean."""
        verdict = verdicts.get(about)
        said = "" if verdict is None else "\n" + textwrap.fill(str(verdict), 62)
        return {"label": name + said, "color": COLOURS[verdict.grade] if verdict else "black", "fontsize": 9}

    curves = report.get("training", {})
    figure = Figure(figsize=(18 if curves else 14, 8.5), layout="constrained")
    figure.suptitle(visible(title, 120), parse_math=False)  # a name may hold a dollar
    axes = figure.subplots(2, 4 if curves else 3)

    ax = axes[0, 0]
    for level in range(index.depth):
        counts = np.sort(np.bincount(index.codes[:, level], minlength=index.level_sizes[level]))[::-1]
        # Thinner from level to level: balanced levels lie on top of each other.
        width = 1 + 2 * (index.depth - level - 1)
        ax.plot(np.linspace(0, 100, len(counts)), counts, linewidth=width, label=f"level {level}")
    most = max(level["largest"] for level in report["levels"])
    ax.set(xlabel="codes, most used first (%)", ylabel="items", ylim=(0, 1.3 * most))
    ax.set_title(**heading("Items per code", "usage"))
    ax.legend()

    ax = axes[0, 1]
    sizes = report["collisions"]["group_sizes"]
    ax.bar(list(sizes), [size * n for size, n in sizes.items()], color=["C2" if s == 1 else "C3" for s in sizes])
    ax.set(xlabel="group size (1: no collision)", ylabel="items")
    ax.set_title(**heading("Items by size of the group with equal codes", "collisions"))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))  # there is no group of 2.5

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
    ax.set(ylim=(0, 1))
    ax.set_title(**heading(f"What prefixes mean: agreement with the {agreement['with'] or 'category'}", "meaning"))
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
