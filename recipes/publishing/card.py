"""The model card of a published recommender, filled from its run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from reasonrec.recipes.evaluation.report import sentence
from reasonrec.recipes.models.card import PLAIN_ADAPTER, TAGS, as_code, as_text
from reasonrec.recipes.models.checkpoint import Setting
from reasonrec.recipes.models.verdict import UNMEASURED, Verdict
from reasonrec.recipes.publishing.commands import launch_file
from reasonrec.tokenizers.catalogue import Catalogue
from reasonrec.tokenizers.manifest import Manifest

_SHOWN = ("hr@10", "ndcg@10")
_METHODS = {"full": "full fine-tuning", "lora": "LoRA", "qlora": "LoRA on a base in 4 bit (NF4)"}


@dataclass(frozen=True)
class Base:
    """The model that a recommender was trained from.

    Attributes:
        name: Its Hub id, `package:NAME`, or the last name of its folder.
        on_hub: Whether the name is one of the Hub's.
        revision: The commit whose weights were checked, where it is known.
        licence: Of the base, for the card; empty where it is not known.
    """

    name: str
    on_hub: bool
    revision: str | None = None
    licence: str = ""


@dataclass(frozen=True)
class About:
    """What a card is made of.

    Attributes:
        repository: Where it will stand.
        kind: `adapter` or `model`, as it is published.
        manifest: The checkpoint's manifest.
        setting: What it was trained with.
        catalogue: Its items.
        base: Its base model.
        lineage: The checkpoints that led to it, itself the last.
        rows: Number of embedding rows, for an adapter that has rows of its own.
        measured: The content of a report's `metrics.json`, if there is one.
        own: Names of the report's rows that are this model's.
        licence: Of what is published, if the user named one.
        titles: Whether titles are published.
    """

    repository: str
    kind: str
    manifest: Manifest
    setting: Setting
    catalogue: Catalogue
    base: Base
    lineage: Sequence[Manifest]
    rows: int | None = None
    measured: Mapping[str, Any] | None = None
    own: Sequence[str] = ()
    licence: str | None = None
    titles: bool = True


def card(about: About) -> str:
    """The README.md: metadata, how to use it, what it was trained on and how, what it is worth, and its limits."""
    name = as_text(about.catalogue.name)
    parts = [
        f"---\n{_metadata(about).to_yaml()}\n---\n# A generative recommender for {name}",
        f"{as_text(about.base.name)} learned {about.catalogue.n_items} items and how people use them, with "
        f"[reasonrec](https://huggingface.co/models?other=reasonrec). {_use(about)}",
        "## Model and data\n\n" + _facts(about),
        "## Training\n\n" + "\n".join(f"```yaml\n{_fenced(launch_file(made))}```" for made in about.lineage),
        "## Evaluation\n\n" + _evaluation(about),
        "## Limits\n\n" + "\n".join(f"- {line}" for line in _limits(about)),
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(about: About) -> ModelCardData:
    adapter = about.kind == "adapter"
    results = [
        EvalResult(
            task_type="next-item-recommendation",
            task_name="Next-item recommendation",
            dataset_type=about.catalogue.name,
            dataset_name=about.catalogue.name,
            dataset_split=str(about.measured["split"]) if about.measured else None,
            metric_type=metric,
            metric_name=f"{metric.upper()}, {level} level, full catalogue: {row['name']}",
            metric_value=round(value, 4),
        )
        for row in _rows(about)
        for level, values in (("item", row["metrics"]), ("SID", row.get("sid_metrics", {})))
        for metric, value in values.items()
        if metric in _SHOWN
    ]
    return ModelCardData(
        base_model=about.base.name if about.base.on_hub else None,
        library_name="peft" if adapter else "transformers",
        license=about.licence,
        model_name=about.repository.rpartition("/")[2],
        eval_results=results or None,
        tags=[*TAGS, "generative-recommendation", about.setting.policy.replace("_", "-")],
    )


def _use(about: About) -> str:
    known = about.catalogue.item_ids[:2]
    here = "" if about.kind == "model" or about.base.on_hub else ', base_model="path/to/the/base/model"'
    text = f"""Load it and ask for items by raw ids:

```python
from reasonrec.recipes.recommender import Recommender

recommender = Recommender.from_pretrained({json.dumps(about.repository)}{here})
for item in recommender.recommend({json.dumps(known)}, k=10):
    print(item.id, item.title, item.score)
```"""
    if about.kind == "model":
        return f"""{text}

It is one checkpoint, which plain transformers loads, without the search over items:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({json.dumps(about.repository)})
```"""
    if about.rows is None:
        return text
    layers = f", num_hidden_layers={about.setting.layers}" if about.setting.layers else ""
    base = json.dumps(about.base.name if about.base.on_hub else "path/to/the/base/model")
    snippet = PLAIN_ADAPTER.format(layers=layers, rows=about.rows, base=base)
    return f"{text}\n\n{snippet.replace('path/to/this/folder', about.repository)}".rstrip()


def _facts(about: About) -> str:
    catalogue, setting, base = about.catalogue, about.setting, about.base
    revision = f", revision `{base.revision}`" if base.revision else ""
    inputs = about.manifest.inputs
    lines = {
        "base model": f"{as_text(base.name)}{revision}, weights `{setting.fingerprint[:20]}…`",
        "licence of the base": as_text(base.licence or "see the base model"),
        "training": f"{_METHODS[setting.method]}, policy {setting.policy}"
        + (", merged" if about.kind == "model" and setting.method != "full" else ""),
        "prompt": as_code(setting.history_prompt),
        "longest history": f"{setting.max_history} items",
        "data": f"{as_text(catalogue.name)}, {catalogue.n_items} items, {catalogue.facts.get('n_users', '?')} users, "
        f"split {as_text(str(catalogue.facts.get('split') or '?'))}",
        "items a user had": "never recommended again" if catalogue.mask_history else "may be recommended again",
        "terms of the data": as_text(str(catalogue.facts.get("terms") or "not said by its reader")),
        "titles": "in the catalogue" if about.titles else "left out: raw ids stand in their place",
        "content hashes": ", ".join(
            f"{name} `{inputs[name][:16]}…`" for name in ("dataset", "index", "traces") if name in inputs
        ),
    }
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in lines.items() if value)


def _rows(about: About) -> list[Mapping[str, Any]]:
    return [] if about.measured is None else [row for row in about.measured["rows"] if row["name"] in about.own]


def _evaluation(about: About) -> str:
    if about.measured is None:
        return "No report was published with this model (`report:` of `publish`)."
    head = about.measured
    others = [row for row in head["rows"] if row["name"] in about.own or row["mode"] == "baseline"]
    sid = any("sid_metrics" in row for row in others)
    names = [metric for metric in _SHOWN if all(metric in row["metrics"] for row in others)]
    titles = [f"{metric.upper()}, item level | 95%" for metric in names]
    titles += [f"{metric.upper()}, SID level" for metric in names] if sid else []
    lines = [f"| | {' | '.join(titles)} |", "|---" * (len(" | ".join(titles).split(" | ")) + 1) + "|"]
    for row in others:
        cells = []
        for metric in names:
            low, high = row["ci95"][metric]
            cells += [f"{row['metrics'][metric]:.4f}", f"{low:.3f}–{high:.3f}"]
        if sid:
            cells += [f"{row['sid_metrics'][metric]:.4f}" if "sid_metrics" in row else "–" for metric in names]
        name = as_text(row["name"])
        lines.append(f"| {f'**{name}**' if row['name'] in about.own else name} | {' | '.join(cells)} |")
    best = set(head["best_baseline"].values())
    claims = [sentence(pair) for pair in head["paired"] if pair["a"] in about.own and pair["b"] in best]
    notes = [f"- {as_text(str(note))}" for note in (*claims, *head["protocol"]["notes"])]
    what = (
        f"{head['n_rows']:,} {head['split']} cases, the full catalogue ranked for each; intervals are bootstraps over "
        "users. The rows of this model are bold, the others are baselines on the same cases."
    )
    return "\n".join([what, "", *lines, "", *notes]).rstrip()


def _limits(about: About) -> list[str]:
    verdict = Verdict.stored(about.manifest)
    pool = about.manifest.facts.get("pool")
    lines = [
        "It recommends the items of its catalogue and no others; an unknown id in a history is skipped.",
        f"Reasoning: {verdict or UNMEASURED}.",
        "It was trained on what people chose in the past and repeats whatever bias is in that.",
    ]
    if isinstance(pool, dict):
        lines.append(f"Its scores are pooled with experts: {', '.join(map(as_text, pool.get('experts', {})))}.")
    if about.setting.method == "qlora" and about.kind == "adapter":
        lines.append("It was trained on a 4-bit base and is loaded so; on whole weights its scores differ.")
    if about.setting.method == "qlora" and about.kind == "model":
        lines.append("It is merged into the weights that the 4-bit base stands for: those of the base differ.")
    return lines


def _fenced(text: str) -> str:
    """A text that does not end its fence."""
    return text.replace("```", "``\u200b`")


def base_licence(folder: Path) -> str:
    """The licence that a model's own card names; empty if it has none."""
    from huggingface_hub import ModelCard

    try:
        return str(ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data.license or "")
    except (OSError, ValueError, yaml.YAMLError):
        return ""
