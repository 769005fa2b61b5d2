"""Showing an evaluation: a plain-text table, `metrics.json` and a self-contained `report.html`."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jinja2
import numpy as np
import polars as pl
from matplotlib.ticker import MaxNLocator

from reasonrec.data_gen.schema import Dataset
from reasonrec.recipes.evaluation.compare import BASELINE, CONTROL, Row
from reasonrec.tokenizers.artefact import kit_version, write_json
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.terminal import say, visible

TEMPLATE = Path(__file__).parent / "report.html"
_IMAGE_TYPES = {".png": "image/png", ".svg": "image/svg+xml", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}
_SHOWN_IN_SLICES = 5
MAX_NAME_CHARS = 120


def sentence(pair: Mapping[str, Any]) -> str:
    """One claim in words; "beats" only if the paired interval is above zero, the deficit otherwise."""
    metric, value = pair["metric"].upper(), pair["difference"]
    interval = f"[{signed(pair['ci95'][0])}, {signed(pair['ci95'][1])}]"
    tail = f"(p {pair['p']:.3f}, Holm {pair['p_holm']:.3f}; detectable {number(pair['mde'])})"
    if (shared := pair.get("overlap")) is not None:
        tail = f"{tail[:-1]}; hits overlap by {number(shared['jaccard'], 2)}, either hits {number(shared['either'])})"
    if pair["verdict"] == "beats":
        return f"{pair['a']} beats {pair['b']} by {number(value)} {metric} {interval} {tail}"
    if pair["verdict"] == "behind":
        return f"{pair['a']} is behind {pair['b']} by {number(-value)} {metric} {interval} {tail}"
    shown = f"no worse than {pair['b']} by a margin of .005" if pair["verdict"] == "no worse" else "undecided"
    return f"{pair['a']} − {pair['b']}: {signed(value)} {metric} {interval}, {shown} {tail}"


def number(value: float | None, digits: int = 4) -> str:
    """A share in the style of the tables: `.0567`, `1.0000`, `–` for nothing."""
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:.{digits}f}"
    text = text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text
    return text.replace("-", "−")


def signed(value: float | None, digits: int = 4) -> str:
    """A difference in the style of the tables: `+.0123`, `−.0045`."""
    text = number(value, digits)
    return text if text.startswith(("−", "–")) else f"+{text}"


def format_table(metrics: Mapping[str, Any]) -> str:
    """The table as plain text, with the paired claims and the protocol in one line each."""
    main = metrics["protocol"]["main_k"]
    hr, ndcg = f"hr@{main}", f"ndcg@{main}"
    others = [name for name in metrics["rows"][0]["metrics"] if name not in (hr, ndcg)]
    others = [name for name in others if name.startswith("hr@") or name == "mrr"]
    sid = any("sid_metrics" in row for row in metrics["rows"])
    head = ["", "mode", hr.upper(), "95%", ndcg.upper(), "95%", *(name.upper() for name in others)]
    head += [f"SID {hr.upper()}", f"SID {ndcg.upper()}"] * sid + ["cover", "valid", "s/user", "tok/user"]
    lines = [head]
    for row in metrics["rows"]:
        cells = [visible(row["name"], MAX_NAME_CHARS), row["mode"]]
        for name in (hr, ndcg):
            low, high = row["ci95"][name]
            cells += [number(row["metrics"][name]), f"{number(low, 3)}–{number(high, 3)}"]
        cells += [number(row["metrics"][name]) for name in others]
        if sid:
            cells += [number(row["sid_metrics"][name]) for name in (hr, ndcg)]
        seconds = row["seconds_per_user"]
        cells += [number(row["coverage"], 3), number(row["valid_ratio"], 3)]
        cells.append("–" if seconds is None else f"{seconds:.3g}")
        lines.append([*cells, f"{row['tokens_per_user']:.0f}"])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = [
        "  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    rule = "─" * max(len(line) for line in text)
    claims = [visible(sentence(pair), 3 * MAX_NAME_CHARS) for pair in metrics["paired"]]
    notes = [f"· {visible(note)}" for note in metrics["protocol"]["notes"]]
    return "\n".join([title(metrics), rule, text[0], rule, *text[1:], rule, *claims, *notes])


def print_table(metrics: Mapping[str, Any]) -> None:
    """Print the table of `format_table`."""
    say(format_table(metrics))


def title(metrics: Mapping[str, Any]) -> str:
    """What was measured, in one line."""
    facts, masked = metrics["dataset"], metrics["protocol"]["history_masked"]
    ranked = metrics["protocol"]["n_candidates"]
    which = "all" if ranked == facts["n_items"] else f"{ranked:,} cold ones"
    name = visible(str(facts.get("name", "dataset")), MAX_NAME_CHARS)
    return (
        f"{name} · {metrics['split']} · {metrics['n_rows']:,} cases of "
        f"{metrics['n_users']:,} users · {facts['n_items']:,} items, {which} ranked · "
        f"history {'masked' if masked else 'not masked'}"
    )


def examples(
    dataset: Dataset,
    split: Literal["valid", "test"],
    rows: Sequence[Row],
    n: int = 6,
    *,
    cases: pl.DataFrame | None = None,
    length: int = 5,
    seed: int = 0,
    thoughts: Mapping[str, Sequence[str]] | None = None,
) -> list[dict[str, Any]]:
    """Random cases with titles, for people to look at.

    Args:
        dataset: The dataset.
        split: Which held-out cases were ranked.
        rows: Rows of the table to show lists of, two or three read best.
        n: Number of cases.
        cases: The held-out rows that were ranked, if it was only a part of the split.
        length: Length of the lists.
        seed: Seed of the draw.
        thoughts: What was thought before each list, by the name of its row.

    Returns:
        For each case the titles of the history (its last eight items), of the target and of each list.
    """
    cases = dataset.rows(split) if cases is None else cases
    titles = dataset.items["title"].to_list()
    drawn = np.random.default_rng(seed).choice(cases.height, size=min(n, cases.height), replace=False)
    result = []
    for i in sorted(drawn.tolist()):
        history, target = cases["history"][i].to_list(), cases["target"][i]
        lists = []
        for row in rows:
            shown = [int(item) for item in row.ranking[i, :length] if item >= 0]
            items = [{"title": titles[item], "hit": item == target} for item in shown]
            lists.append({"name": row.name, "items": items, "thought": (thoughts or {}).get(row.name, {i: ""})[i]})
        case = {"history": [titles[item] for item in history[-8:]], "cut": len(history) > 8}
        result.append({**case, "target": titles[target], "lists": lists})
    return result


def write_report(
    folder: str | Path,
    metrics: Mapping[str, Any],
    extra_images: Mapping[str, str | Path | bytes] | None = None,
    examples: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Write `metrics.json` and `report.html`.

    Args:
        folder: An existing folder.
        metrics: What `comparison.evaluate_rows` returned.
        extra_images: Caption to image: a path (png, svg, jpg) or the bytes of a PNG.
        examples: Cases to show, from `examples`.

    Returns:
        The path of the report, one file without references to others.

    Raises:
        UserError: If an image is missing or of another type.
    """
    folder = Path(folder)
    write_json(folder / "metrics.json", dict(metrics))
    path = folder / "report.html"
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(_render(metrics, extra_images or {}, examples), encoding="utf-8")
    temporary.replace(path)
    return path


def _render(
    metrics: Mapping[str, Any],
    images: Mapping[str, str | Path | bytes],
    cases: Sequence[Mapping[str, Any]],
) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
    )
    environment.filters.update(number=number, signed=signed)
    rows, main = metrics["rows"], metrics["protocol"]["main_k"]
    hr, ndcg = f"hr@{main}", f"ndcg@{main}"
    best = set(metrics["best_baseline"].values())

    def kind(row: Mapping[str, Any]) -> str:
        """Style of a row."""
        if row["mode"] == CONTROL:
            return "control"
        return "model" if row["mode"] != BASELINE else ("best" if row["name"] in best else "base")

    script = TEMPLATE.with_suffix(".js").read_text(encoding="utf-8")

    def slice_high(metric: str, shown: Sequence[Mapping[str, Any]]) -> float:
        """Right end of the slices' axis."""
        ends = [part[f"{metric}_ci95"][1] or part[metric] for row in shown for part in row["slices"].values()]
        return max(ends, default=0.0)

    return environment.get_template(TEMPLATE.name).render(
        m=metrics,
        heading=f"{metrics['dataset'].get('name', 'Dataset')}: who ranks the next item best?",
        title=title(metrics),
        hr=hr,
        ndcg=ndcg,
        columns=list(rows[0]["metrics"]),
        top={name: max(row["metrics"][name] for row in rows) for name in rows[0]["metrics"]},
        slice_top={s: max(row["slices"][s][hr] for row in rows) for s in metrics["slices"]},
        shown=_shown_in_slices(rows, metrics["best_baseline"].get(hr), hr),
        sid=any("sid_metrics" in row for row in rows),
        kind=kind,
        sentence=sentence,
        slice_high=slice_high,
        ticks_of=_ticks,
        examples=cases,
        images=[(caption, _data_uri(source)) for caption, source in images.items()],
        version=kit_version(),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _printable(value: Any) -> Any:
    """What the template shows: `autoescape` takes markup away, this what would hide or reorder text."""
    return visible(value, lines=True) if type(value) is str else value


def _shown_in_slices(rows: Sequence[Mapping[str, Any]], best: str | None, hr: str) -> list[Mapping[str, Any]]:
    """The rows of the slices' plot: models, the best baseline, then what else there is room for."""

    def order(row: Mapping[str, Any]) -> tuple[int, float]:
        group = 1 if row["name"] == best else {BASELINE: 2, CONTROL: 3}.get(row["mode"], 0)
        return group, -row["metrics"][hr]

    return sorted(rows, key=order)[:_SHOWN_IN_SLICES]


def _ticks(low: float, high: float) -> list[float]:
    """Round ticks that enclose an interval."""
    ticks = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, max(high, low + 1e-3))
    return [round(float(tick), 10) for tick in ticks]


def _data_uri(source: str | Path | bytes) -> str:
    if isinstance(source, bytes):
        kind, content = "image/png", source
    else:
        path = Path(source)
        if not path.is_file() or path.suffix not in _IMAGE_TYPES:
            raise UserError(f"image {path}: not a file of type {', '.join(_IMAGE_TYPES)}")
        kind, content = _IMAGE_TYPES[path.suffix], path.read_bytes()
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
