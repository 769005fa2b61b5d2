"""The table: what is measured, what may be claimed, and a report that shows data as data."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
from playwright.sync_api import Browser

from reasonrec.recipes.evaluation import report
from reasonrec.recipes.evaluation.compare import Row, evaluate_rows, overlap, verdict
from reasonrec.tokenizers.errors import UserError

N_ITEMS, N_CASES = 30, 200
EVIL = "<script>alert(1)</script>"


@pytest.fixture
def dataset() -> Any:
    rng = np.random.default_rng(0)
    target = rng.integers(N_ITEMS, size=N_CASES)
    masked = [[int((item + 1) % N_ITEMS)] for item in target]
    cases = pl.DataFrame(
        {
            "user": np.arange(N_CASES) // 2,
            "history": masked,
            "target": target,
            "masked": masked,
            "same_time": rng.random(N_CASES) < 0.3,
        },
        schema_overrides={"masked": pl.List(pl.Int32), "history": pl.List(pl.Int32)},
    )
    items = pl.DataFrame({"title": [f"{EVIL} {i}" for i in range(N_ITEMS)], "train_count": range(N_ITEMS)})
    facts = {
        "name": f"Test {EVIL}",
        "n_items": N_ITEMS,
        "split": "leave_one_out",
        "mask_history": True,
        "filters": [{"step": "k_core", "rows_before": 2000, "rows_after": 1000}],
        "notes": ["other users' futures visible", "a note of its own"],
    }
    return SimpleNamespace(
        train=pl.DataFrame({"items": [list(range(25))]}, schema={"items": pl.List(pl.Int32)}),
        items=items,
        n_items=N_ITEMS,
        facts=facts,
        manifest=SimpleNamespace(hash="a" * 64),
        rows={"test": cases, "valid": cases}.__getitem__,
    )


def ranking(dataset: Any, share: float, seed: int = 0, width: int = 20) -> np.ndarray:
    """Lists without masked items; the target stands first in about this share of them, else nowhere."""
    cases = dataset.rows("test")
    hit = np.random.default_rng(seed).random(N_CASES) < share
    result = np.empty((N_CASES, width), dtype=np.int32)
    for i, target in enumerate(cases["target"].to_list()):
        others = [item for item in range(N_ITEMS) if item not in (target, (target + 1) % N_ITEMS)]
        result[i] = ([target] if hit[i] else []) + others[: width - int(hit[i])]
    return result


@pytest.fixture
def rows(dataset: Any) -> list[Row]:
    return [
        Row("weak", "baseline", ranking(dataset, 0.1, 1)),
        Row("strong", "baseline", ranking(dataset, 0.3, 2), note="exponent 0"),
        Row("model, beam 20", "direct", ranking(dataset, 0.7, 3), seconds_per_user=0.25),
        Row(f"thinks {EVIL}", "reasoning", ranking(dataset, 0.3, 4)),
        Row("other history", "control", ranking(dataset, 0.1, 5)),
    ]


@pytest.fixture
def metrics(dataset: Any, rows: list[Row]) -> dict[str, Any]:
    return evaluate_rows(dataset, "test", rows, claims=[("model, beam 20", "other history")], draws=300)


def test_metrics_have_the_promised_shape(metrics: dict[str, Any], rows: list[Row], dataset: Any) -> None:
    assert [row["name"] for row in metrics["rows"]] == [row.name for row in rows]
    model = metrics["rows"][2]
    hits = (rows[2].ranking[:, 0] == dataset.rows("test")["target"].to_numpy()).mean()
    assert model["metrics"]["hr@1"] == model["metrics"]["hr@10"] == pytest.approx(hits)
    assert set(model["metrics"]) == {f"{m}@{k}" for m in ("hr", "ndcg") for k in (1, 5, 10, 20)} | {"mrr"}
    for name, value in model["metrics"].items():
        low, high = model["ci95"][name]
        assert low < value < high
    assert model["valid_ratio"] == 1.0
    assert model["seconds_per_user"] == 0.25
    assert (metrics["n_rows"], metrics["n_users"]) == (200, 100)
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


def test_models_meet_the_best_baseline_and_controls_do_not(metrics: dict[str, Any]) -> None:
    pairs = {(pair["a"], pair["b"], pair["metric"]): pair for pair in metrics["paired"]}
    assert set(pairs) == {
        (a, b, metric)
        for metric in ("hr@10", "ndcg@10")
        for a, b in (
            ("model, beam 20", "strong"),
            (f"thinks {EVIL}", "strong"),
            ("model, beam 20", "other history"),
        )
    }
    best = pairs["model, beam 20", "strong", "hr@10"]
    by_name = {row["name"]: row["metrics"]["hr@10"] for row in metrics["rows"]}
    assert best["difference"] == pytest.approx(by_name["model, beam 20"] - by_name["strong"])
    assert best["ci95"][0] > 0
    assert best["verdict"] == "beats"
    assert best["p"] <= best["p_holm"] < 0.05
    assert pairs[f"thinks {EVIL}", "strong", "hr@10"]["verdict"] != "beats"
    assert by_name["model, beam 20"] <= best["overlap"]["either"] <= by_name["model, beam 20"] + by_name["strong"]
    assert f"either hits {report.number(best['overlap']['either'])})" in report.sentence(best)
    assert "overlap" not in pairs["model, beam 20", "strong", "ndcg@10"]


def test_overlap_by_hand() -> None:
    assert overlap(np.array([1.0, 1, 0, 0]), np.array([1.0, 0, 1, 0])) == {
        "jaccard": pytest.approx(1 / 3),
        "either": 0.75,
    }
    assert overlap(np.zeros(2), np.zeros(2)) == {"jaccard": 0.0, "either": 0.0}


def test_slices_are_weighted_means_of_the_whole(metrics: dict[str, Any]) -> None:
    for row in metrics["rows"]:
        parts = [row["slices"][name] for name in ("head", "tail")]
        assert sum(part["n"] for part in parts) == 200
        assert sum(part["n"] * part["hr@10"] for part in parts) / 200 == pytest.approx(row["metrics"]["hr@10"])
    assert metrics["slices"]["cold"]["n"] == metrics["rows"][0]["slices"]["cold"]["n"] > 0
    assert "repeat" not in metrics["slices"]  # nobody has one here


def test_verdicts() -> None:
    assert verdict(0.001, 0.02) == "beats"
    assert verdict(-0.02, -0.001) == "behind"
    assert verdict(-0.004, 0.02) == "no worse"
    assert verdict(-0.006, 0.02) == "undecided"


def test_the_word_beats_needs_an_interval_above_zero(metrics: dict[str, Any]) -> None:
    for pair in metrics["paired"]:
        assert (" beats " in report.sentence(pair)) == (pair["ci95"][0] > 0)
    behind = {**metrics["paired"][0], "difference": -0.0123, "ci95": [-0.02, -0.01], "verdict": "behind"}
    assert "is behind strong by .0123 HR@10 [−.0200, −.0100]" in report.sentence(behind)


def test_a_broken_list_shows_in_the_valid_ratio(dataset: Any) -> None:
    broken = ranking(dataset, 0.5)
    broken[:, 1] = broken[:, 0]
    found = evaluate_rows(dataset, "test", [Row("broken", "direct", broken)], draws=20)
    assert found["rows"][0]["valid_ratio"] == pytest.approx(0.95)
    assert found["paired"] == []


def test_sid_column_counts_ids(dataset: Any, rows: list[Row]) -> None:
    one_id = np.zeros(N_ITEMS, dtype=int)
    found = evaluate_rows(dataset, "test", rows[:1], sid_of_item=one_id, draws=20)
    assert found["rows"][0]["sid_metrics"]["hr@1"] == 1.0
    assert found["rows"][0]["metrics"]["hr@1"] < 1.0
    assert "SID HR@10" in report.format_table(found)


def test_notes_say_what_a_reader_must_know(metrics: dict[str, Any]) -> None:
    notes = metrics["protocol"]["notes"]
    assert sum("futures visible" in note for note in notes) == 1
    assert any("masked in every row" in note for note in notes)
    assert any("'same time'" in note for note in notes)
    assert "a note of its own" in notes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [*rows, rows[0]], "two rows are called"),
        (lambda rows: [Row("narrow", "direct", rows[0].ranking[:, :10])], "shape"),
        (lambda rows: [Row("few", "direct", rows[0].ranking[:10])], "shape"),
        (lambda _: [], "nothing to evaluate"),
    ],
)
def test_bad_rows_are_refused(dataset: Any, rows: list[Row], change: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate_rows(dataset, "test", change(rows), draws=10)
    with pytest.raises(UserError, match="is no row"):
        evaluate_rows(dataset, "test", rows, claims=[("weak", "nobody")], draws=10)


def test_table_is_aligned(metrics: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    report.print_table(metrics)
    lines = capsys.readouterr().out.splitlines()
    assert "200 cases of 100 users" in lines[0]
    table = [line for line in lines[2:] if not line.startswith(("─", "·"))][:6]
    assert len({len(line) for line in table}) == 1


def test_report_is_one_file_and_shows_text_as_text(
    tmp_path: Path, metrics: dict[str, Any], dataset: Any, rows: list[Row]
) -> None:
    cases = report.examples(dataset, "test", rows[1:3], n=3)
    image = b"\x89PNG not really"
    path = report.write_report(tmp_path, metrics, {f"loss {EVIL}": image}, cases)
    html = path.read_text(encoding="utf-8")
    assert html.count("<script>") == html.count("<script") == 1, "its own"
    assert "script-src 'sha256-" in html
    assert "&lt;script&gt;" in html
    assert not re.search(r"(src|href)=[\"'](?!data:)", html)  # nothing is loaded from elsewhere
    assert "url(" not in html
    assert html.count("<svg") >= 4
    assert "data:image/png;base64," in html
    for row in metrics["rows"]:
        assert report.number(row["metrics"]["hr@10"]) in html
    assert json.loads((tmp_path / "metrics.json").read_text())["rows"] == metrics["rows"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.json", "report.html"]


def test_names_that_would_hide_or_reorder_text_are_written_out(
    tmp_path: Path, metrics: dict[str, Any], dataset: Any, rows: list[Row]
) -> None:
    """In the table and on the page, in text and in attributes; the numbers' file keeps them as they are."""
    evil = 'x" onload="alert(1)\x1b[2J\u202e\n' + "y" * 500
    named = json.loads(json.dumps(metrics).replace("model, beam 20", json.dumps(evil)[1:-1]))
    named["dataset"]["name"] = evil
    shown = report.format_table(named)
    assert len(shown.splitlines()) == len(report.format_table(metrics).splitlines())
    assert r'x" onload="alert(1)\x1b[2J\u202e\n' in shown
    assert all(character.isprintable() or character == "\n" for character in shown)
    assert max(map(len, shown.splitlines())) < 700
    named["rows"][2]["note"] = evil
    cases = report.examples(dataset, "test", rows[:1], n=1)
    cases[0]["history"] = [evil]
    page = report.write_report(tmp_path, named, {evil: b"png"}, cases).read_text(encoding="utf-8")
    assert not set("\x1b\u202e") & set(page)
    assert 'x" onload' not in page
    assert page.count("x&#34; onload=&#34;alert(1)\\x1b[2J\\u202e") > 5
    stored = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert stored["dataset"]["name"] == named["dataset"]["name"]


def test_report_of_baselines_alone(tmp_path: Path, dataset: Any, rows: list[Row]) -> None:
    found = evaluate_rows(dataset, "valid", rows[:1], ks=(5,), draws=20)
    assert "HR@5" in report.write_report(tmp_path, found).read_text()
    assert any("Validation" in note for note in found["protocol"]["notes"])


def test_missing_images_are_refused(tmp_path: Path, metrics: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="not a file of type"):
        report.write_report(tmp_path, metrics, {"loss": tmp_path / "nowhere.png"})


def test_numbers_are_written_like_the_tables() -> None:
    assert [report.number(v) for v in (0.0567, 1.0, -0.25, None, float("nan"))] == [
        ".0567",
        "1.0000",
        "−.2500",
        "–",
        "–",
    ]
    assert [report.signed(v) for v in (0.01, -0.01, 0.0)] == ["+.0100", "−.0100", "+.0000"]


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_tables_fit_a_screen_and_can_be_sorted(
    width: int, browser: Browser, tmp_path: Path, metrics: dict[str, Any]
) -> None:
    metrics["rows"][0]["name"] = "a name of a checkpoint that is quite long/" * 3
    path = report.write_report(tmp_path, metrics)
    page = browser.new_page(viewport={"width": width, "height": 800})
    problems: list[str] = []
    page.on("console", lambda said: problems.append(said.text) if said.type == "error" else None)
    page.goto(path.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "what is wide scrolls by itself"
    table = page.locator("table").first
    first = table.locator("tbody tr").first.locator("td").first
    before = first.bounding_box()
    page.locator(".scroll").first.evaluate("box => { box.scrollLeft = 300; }")
    after = first.bounding_box()
    assert before is not None
    assert after is not None
    assert after["x"] == pytest.approx(before["x"], abs=4), "the names stay"
    assert after["x"] + after["width"] < width * 0.6

    column = 2
    table.locator("thead button").nth(column).press("Enter")
    cells = [text.split()[0] for text in table.locator(f"tbody td:nth-child({column + 1})").all_text_contents()]
    numbers = [float(cell) for cell in cells]
    assert len(set(numbers)) > 1
    assert numbers == sorted(numbers, reverse=True)
    assert table.locator("thead th").nth(column).get_attribute("aria-sort") == "descending"
    table.locator("thead button").nth(column).press("Enter")
    again = [float(t.split()[0]) for t in table.locator(f"tbody td:nth-child({column + 1})").all_text_contents()]
    assert again == sorted(numbers)
    assert problems == [], "its own script may run"
    page.close()
