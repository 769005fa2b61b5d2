"""A card of names of others is still a card, and shows both levels of what was counted."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from reasonrec.recipes.models.checkpoint import Setting
from reasonrec.recipes.publishing.card import About, Base, base_licence, card
from reasonrec.tokenizers.artefact import read_manifest
from reasonrec.tokenizers.catalogue import Catalogue

EVIL = "x](javascript:alert(1)) <script>alert(2)</script> | `` ![a](b) https://a.b a@b.c\n---\nlicense: mine\n```\n"
TAGS = {"h1", "h2", "p", "table", "thead", "tbody", "tr", "th", "td", "code", "pre", "ul", "li", "a", "strong"}


def about(adapter: Path, name: str) -> About:
    manifest = read_manifest(adapter)
    manifest.config["system"] = name
    catalogue = replace(Catalogue.load(adapter, manifest.facts), name=name, facts={"terms": name, "split": name})
    setting = replace(Setting.stored(manifest), history_prompt=f"{name}{{history}}")
    metrics = {"hr@10": 0.25, "ndcg@10": 0.125}
    row = {
        "metrics": metrics,
        "sid_metrics": {"hr@10": 0.5, "ndcg@10": 0.375},
        "ci95": {"hr@10": [0, 1], "ndcg@10": [0, 1]},
    }
    rows = [row | {"name": name, "mode": "direct"}, row | {"name": "popularity", "mode": "baseline"}]
    pair = {"a": name, "b": "popularity", "metric": "hr@10", "difference": 0.1, "ci95": [0.05, 0.2], "p": 0.01,
            "p_holm": 0.02, "mde": 0.1, "verdict": "beats"}  # fmt: skip
    measured = {"rows": rows, "paired": [pair], "best_baseline": {"hr@10": "popularity"}, "split": "test",
                "n_rows": 12, "protocol": {"notes": [name]}}  # fmt: skip
    base = Base(name, on_hub=True, revision="f" * 40, licence=name)
    return About("you/mine", "adapter", manifest, setting, catalogue, base, [manifest], 417, measured, [name])


def test_names_of_others_are_shown_and_not_obeyed(adapter: Path) -> None:
    made = ModelCard(card(about(adapter, EVIL)))
    assert made.data.license is None
    assert made.data.base_model == EVIL
    page = str(MarkdownIt("gfm-like", {"linkify": False, "html": True}).render(made.text))
    assert not set(re.findall(r"<(\w+)", page)) - TAGS
    assert set(re.findall(r'href="([^"]*)"', page)) == {"https://huggingface.co/models?other=reasonrec"}
    assert page.count("<pre>") == 3, "the kit, PEFT, the training"


def test_both_levels_are_named(adapter: Path) -> None:
    text = card(about(adapter, "mine"))
    assert "| | HR@10, item level | 95% | NDCG@10, item level | 95% | HR@10, SID level | NDCG@10, SID level |" in text
    assert "| **mine** | 0.2500 | 0.000–1.000 | 0.1250 | 0.000–1.000 | 0.5000 | 0.3750 |" in text
    assert "mine beats popularity by .1000 HR\\@10" in text
    results = {result.metric_name: result.metric_value for result in ModelCard(text).data.eval_results}
    assert results["HR@10, item level, full catalogue: mine"] == 0.25
    assert results["HR@10, SID level, full catalogue: mine"] == 0.5


def test_the_licence_of_the_base_is_what_its_card_says(tmp_path: Path) -> None:
    assert base_licence(tmp_path) == ""
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A base\n")
    assert base_licence(tmp_path) == "apache-2.0"
    (tmp_path / "README.md").write_text("---\n: [\n---\n")
    assert base_licence(tmp_path) == ""
