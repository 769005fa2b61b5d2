"""The evaluation stage on a trained model: its table, its controls, its mistakes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonrec.data_gen.schema import Dataset
from reasonrec.recipes import eval_ranking
from reasonrec.recipes.evaluation.controls import other_histories
from reasonrec.recipes.rankers.model import ModelRanker
from reasonrec.recipes.recommender import Recommender
from reasonrec.rewards.metrics import per_row
from reasonrec.tokenizers.artefact import read_manifest
from reasonrec.tokenizers.places import place

Evaluate = Callable[..., dict[str, Any]]
NAMES = {f"{metric}@{k}" for metric in ("hr", "ndcg") for k in (1, 5, 10, 20)} | {"mrr"}


@pytest.fixture(scope="module")
def flags(tiny_dataset: Path, adapter: Path) -> list[str]:
    return ["--dataset", str(tiny_dataset), "--models", str(adapter), "--precision", "fp32"]


@pytest.fixture(scope="module")
def report(
    stage: Callable[..., subprocess.CompletedProcess[str]],
    flags: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, str]:
    """A report as a user makes it, and what was printed."""
    out = tmp_path_factory.mktemp("eval") / "report"
    return out, stage("eval_ranking", *flags, "--num_beams", "20", "--output_dir", str(out)).stdout


@pytest.fixture
def evaluate(flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Evaluate:
    """Run the stage in this process; gives `metrics.json`."""

    def run(*more: str, out: str = "report") -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["eval_ranking.py", *flags, "--output_dir", str(tmp_path / out), *more])
        eval_ranking.run(eval_ranking.main)()
        return dict(json.loads((tmp_path / out / "metrics.json").read_text()))

    return run


def timeless(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics without what a clock decides."""
    rows = [{**row, "seconds_per_user": None} for row in metrics["rows"]]
    return {**metrics, "rows": rows}


def test_the_table_of_a_trained_model(report: tuple[Path, str], tiny_dataset: Path, adapter: Path) -> None:
    out, printed = report
    assert {path.name for path in out.iterdir()} == {"manifest.json", "metrics.json", "report.html"}
    assert read_manifest(out, "report").inputs == {
        "dataset": read_manifest(tiny_dataset).hash,
        place(str(adapter), out): read_manifest(adapter).hash,
    }
    metrics = json.loads((out / "metrics.json").read_text())
    modes = {row["name"]: row["mode"] for row in metrics["rows"]}
    assert modes["lora, exact search"] == "direct"
    assert modes["lora, another user's history"] == "control"
    assert modes["popularity"] == "baseline"
    assert list(modes.values()).count("baseline") >= 4
    for row in metrics["rows"]:
        assert set(row["metrics"]) == set(row["ci95"]) == NAMES
        assert row["valid_ratio"] == 1.0
        for name, value in row["metrics"].items():
            low, high = row["ci95"][name]
            assert 0 <= low <= value <= high <= 1
    claims = {(pair["a"], pair["b"], pair["metric"]) for pair in metrics["paired"]}
    for other in ("popularity", "lora, another user's history"):
        assert ("lora, exact search", other, "hr@10") in claims
        assert ("lora, exact search", other, "ndcg@10") in claims
    assert (metrics["split"], metrics["n_rows"], metrics["dataset"]["n_items"]) == ("test", 30, 48)
    page = (out / "report.html").read_text()
    for name in modes:
        assert name.replace("'", "&#39;") in page
        assert name in printed
    assert str(adapter.parent) not in page


def test_the_numbers_are_those_of_the_recommender(report: tuple[Path, str], tiny_dataset: Path, adapter: Path) -> None:
    import torch

    cases = Dataset.load(tiny_dataset).test
    recommender = Recommender.from_pretrained(adapter, dtype=torch.float32)
    ranking = recommender.rank(cases["history"].to_list(), k=20, num_beams=20, batch_size=1)[0]
    expected = per_row(ranking, cases["target"].to_numpy(), (1, 5, 10, 20))
    metrics = json.loads((report[0] / "metrics.json").read_text())
    (row,) = (row for row in metrics["rows"] if row["mode"] == "direct")
    for name, values in expected.items():
        assert row["metrics"][name] == pytest.approx(values.mean()), name


def test_the_batch_size_does_not_change_the_table(evaluate: Evaluate, report: tuple[Path, str]) -> None:
    by_16 = json.loads((report[0] / "metrics.json").read_text())
    by_1 = evaluate("--num_beams", "20", "--batch_size", "1", out="1")
    by_64 = evaluate("--num_beams", "20", "--batch_size", "64", out="64")
    assert timeless(by_1) == timeless(by_16) == timeless(by_64)


def test_two_processes_share_the_cases(
    evaluate: Evaluate, flags: list[str], adapter: Path, stage_on_two, tmp_path: Path
) -> None:
    """Lists, scores and chains to the last bit, of a last batch that is not full as well."""
    asked = ["--num_beams", "20", "--batch_size", "7", "--reasoning_models", str(adapter), "--chains", "2"]
    asked += ["--max_chain", "6", "--fuse", "true"]
    alone = evaluate(*asked, out="alone")
    done = stage_on_two("eval_ranking", *flags, *asked, "--output_dir", str(tmp_path / "two"))
    assert done.stdout.count("two/report.html shows the same") == 1
    assert done.stdout.count("precision: fp32") == 2, "once for each model, said by one process"
    assert timeless(json.loads((tmp_path / "two" / "metrics.json").read_text())) == timeless(alone)


def test_a_sample_of_the_cases(evaluate: Evaluate) -> None:
    few = evaluate("--max_rows", "7", "--split", "valid", "--no_control", "--no_baselines", "--num_beams", "48")
    assert (few["n_rows"], few["split"]) == (7, "valid")
    assert [row["name"] for row in few["rows"]] == ["lora, exhaustive"]
    assert few["paired"] == []
    assert any("Only 7 cases" in note for note in few["protocol"]["notes"])


def test_the_whole_catalogue_is_scored_as_item_by_item(tiny_dataset: Path, adapter: Path) -> None:
    cases = Dataset.load(tiny_dataset).test.head(5)
    recommender = Recommender.from_pretrained(adapter, dtype="fp32")
    everything = np.stack([np.random.default_rng(row).permutation(48) for row in range(5)])
    found = ModelRanker(recommender, "whole").score(cases, everything)
    halves = [ModelRanker(recommender, "half").score(cases, half) for half in np.split(everything, 2, axis=1)]
    np.testing.assert_allclose(found, np.concatenate(halves, axis=1), atol=1e-4)
    np.testing.assert_allclose(np.exp(found).sum(1), 1, atol=1e-4)


def test_what_is_fused_stands_beside_what_it_is_fused_of(evaluate: Evaluate, tiny_dataset: Path) -> None:
    metrics = evaluate("--fuse", "--sasrec_trials", "1", "--num_beams", "48", "--no_control")
    rows = {row["name"]: row for row in metrics["rows"]}
    assert rows["fused without an LLM"]["mode"] == "baseline"
    assert rows["fused with lora"]["mode"] == "direct"
    note = rows["fused with lora"]["note"]
    assert all(expert in note for expert in ("co-visitation, tuned", "SASRec", "lora, exhaustive"))
    assert sum(float(weight) for weight in re.findall(r"([\d.]+) ×", note)) == pytest.approx(1)
    claims = {(pair["a"], pair["b"]) for pair in metrics["paired"]}
    assert {("fused with lora", "fused without an LLM"), ("fused with lora", "lora, exhaustive")} <= claims
    assert all(row["valid_ratio"] == 1 for row in rows.values())


def test_a_model_that_goes_on_from_another_one_needs_no_control_of_its_own(
    evaluate: Evaluate, adapter: Path, tmp_path: Path, edit_manifest: Callable[..., None]
) -> None:
    later = shutil.copytree(adapter, tmp_path / "later")
    edit_manifest(later, lambda manifest: manifest.inputs.update(model=read_manifest(adapter).hash))
    few = ("--max_rows", "7", "--no_baselines", "--num_beams", "20")
    both = evaluate("--models", str(adapter), str(later), *few, out="both")
    names = [row["name"] for row in both["rows"]]
    assert names == ["lora, exact search", "lora, another user's history", "later, exact search"]
    alone = evaluate("--models", str(later), *few, out="alone")
    assert [row["mode"] for row in alone["rows"]] == ["direct", "control"], "its start is not in the table"


@given(
    users=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    lengths=st.lists(st.integers(1, 4), min_size=12, max_size=12),
    seed=st.integers(0, 3),
)
@settings(max_examples=200, deadline=None)
def test_the_control_never_reads_the_users_own_history(users: list[int], lengths: list[int], seed: int) -> None:
    histories = [[user] * length for user, length in zip(users, lengths, strict=False)]  # items tell whose it is
    cases = pl.DataFrame({"user": users, "history": histories})
    others = other_histories(cases, seed)
    assert others == other_histories(cases, seed)
    if len(set(users)) == 1:
        assert others == [[]] * len(users)
    else:
        assert all(other and set(other) != {user} for user, other in zip(users, others, strict=True))


def test_the_control_keeps_the_lengths(tiny_dataset: Path) -> None:
    cases = Dataset.load(tiny_dataset).test
    others = other_histories(cases, seed=0)
    lengths = cases["history"].list.len().to_list()
    differences = [abs(len(other) - length) for other, length in zip(others, lengths, strict=True)]
    assert max(differences) <= 1
    assert sum(differences) <= len(set(lengths))
    assert all(other != own for other, own in zip(others, cases["history"].to_list(), strict=True))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--num_beams", "19"], ["num_beams=19", "at least 20"]),
        (["--split", "tests"], ["tests", "valid", "test"]),
        (["--model", "x"], ["unknown flag --model;", "'models'"]),
        (["--models", "nowhere"], ["nowhere", "run its stage"]),
        (["--fuse", "--no_baselines"], ["fuse=true", "leave baselines on"]),
        (["--candidates", "cold"], ["candidates=cold", "every target"]),
    ],
)
def test_mistakes_are_named(
    evaluate: Evaluate, more: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        evaluate(*more)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert not list(tmp_path.iterdir())


def test_a_model_of_another_dataset_and_an_existing_report_are_refused(
    evaluate: Evaluate,
    other_world: tuple[Path, Path],
    adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        evaluate("--dataset", str(other_world[0]))
    error = capsys.readouterr().err
    assert read_manifest(adapter).inputs["dataset"][:12] in error
    assert read_manifest(other_world[0]).hash[:12] in error
    assert not list(tmp_path.iterdir())
    (tmp_path / "report").mkdir()
    with pytest.raises(SystemExit):
        evaluate()
    assert "--overwrite" in capsys.readouterr().err


def test_paths_of_a_model_without_guesses_cannot_be_checked(
    evaluate: Evaluate, capsys: pytest.CaptureFixture[str]
) -> None:
    how = ("--theta", "0.06", "--num_beams", "20", "--no_control", "--no_baselines", "--max_rows", "4")
    with pytest.raises(SystemExit):
        evaluate(*how, out="refused")
    assert "theta=0.06 prunes the paths of a beam search: set exact: false" in capsys.readouterr().err
    rows = evaluate(*how, "--exact", "false")["rows"]
    assert [row["name"] for row in rows] == ["lora, beam 20"]
    printed = "".join(capsys.readouterr())
    assert "lora, beam 20: no row with consistent paths (theta=0.06): policy semantic_id guesses no cat" in printed


def test_chains_that_state_no_category_are_kept(evaluate: Evaluate, adapter: Path) -> None:
    how = ("--reasoning_models", str(adapter), "--chain_theta", "0", "--chains", "2", "--max_chain", "3")
    metrics = evaluate(*how, "--num_beams", "20", "--no_control", "--no_baselines", "--max_rows", "3")
    _, plain, consistent = metrics["rows"]
    assert consistent["name"] == plain["name"] + ", consistent chains"
    assert (consistent["mode"], consistent["metrics"]) == ("reasoning", plain["metrics"])
    assert "chain_theta=0 left out 0 of 6 chains" in consistent["note"]
    assert (consistent["name"], plain["name"]) in {(pair["a"], pair["b"]) for pair in metrics["paired"]}
