"""Stage by stage with parallel codes, as a user launches them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from reasonrec.data_gen.schema import Dataset
from reasonrec.recipes.decoding.consistency import Consistency
from reasonrec.recipes.rankers.consistent import ConsistentRanker
from reasonrec.recipes.rankers.model import ModelRanker
from reasonrec.recipes.recommender import Recommender
from reasonrec.tokenizers.artefact import read_manifest
from reasonrec.tokenizers.errors import UserError

SHORT = ["--precision", "fp32", "--report_to", "none", "--activation_checkpointing", "false", "--save_steps", "100"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(stage, tiny_base, tiny_dataset, set_index, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("reg4rec") / "sft"
    done = stage(
        "sft", "--dataset", str(tiny_dataset), "--index", str(set_index), "--model", str(tiny_base),
        "--policy", "parallel_codes", "--method", "lora", "--lora_r", "4", "--max_history", "6", "--tasks",
        "{seqrec: 1}", "--num_train_epochs", "2", "--per_device_train_batch_size", "16", "--learning_rate", "5e-3",
        "--output_dir", str(out), *SHORT,
    )  # fmt: skip
    assert "leave a choice" in done.stdout + done.stderr
    return out


def test_it_learns_and_keeps_its_categories(trained):
    metrics = json.loads((trained / "train_metrics.json").read_text())
    losses = [entry["loss"] for entry in metrics["log"] if "loss" in entry]
    assert losses[-1] < losses[0]
    assert metrics["train"]["category_loss"] > 0
    assert read_manifest(trained).facts["setting"]["policy"] == "parallel_codes"


def test_it_ranks_scores_and_follows_a_user(trained, tiny_dataset):
    recommender = Recommender.from_pretrained(trained, dtype="fp32", device="cpu")
    histories = [history[-6:] for history in Dataset.load(tiny_dataset).test["history"].to_list()[:4]]
    items, scores = recommender.rank(histories, k=48, exhaustive=True)
    assert [sorted(row) for row in items.tolist()] == [list(range(48))] * 4
    np.testing.assert_allclose(np.exp(scores).sum(1), 1, atol=1e-4)
    np.testing.assert_allclose(recommender.score(histories, items), scores, atol=1e-4)
    session = recommender.session(histories[0][:3])
    for item in histories[0][3:]:
        session.append(item)
    np.testing.assert_allclose(session.search(k=5).scores, scores[:1, :5], atol=1e-4)


def test_it_recommends_what_came_later(trained, tiny_dataset, later_version, tmp_path):
    before = Recommender.from_pretrained(trained, dtype="fp32", device="cpu")
    after = before.with_catalogue(later_version(before.policy.catalogue, tmp_path / "later", new=3))
    history = Dataset.load(tiny_dataset).test["history"].to_list()[0][-6:]
    items, scores = after.rank([history], k=51, exhaustive=True)
    assert sorted(items[0].tolist()) == list(range(51))
    np.testing.assert_allclose(np.exp(scores).sum(1), 1, atol=1e-4)


def test_its_paths_can_be_checked_where_it_guesses_categories(trained, tiny_dataset):
    recommender = Recommender.from_pretrained(trained, dtype="fp32", device="cpu")
    plain = ModelRanker(recommender, "sft", num_beams=10, exact=False)
    rows = Dataset.load(tiny_dataset).rows("valid").head(5)
    consistent = ConsistentRanker(plain, Consistency(1))
    for _ in range(2):  # a ranking does not count those before it
        assert (consistent.rank(rows, 10) == plain.rank(rows, 10)).all()
        assert "of 0 of 5 users were pruned" in consistent.note
    assert (consistent.score(rows, consistent.rank(rows, 3)) > -np.inf).all()
    recommender.policy.answers.n_categories = 0
    with pytest.raises(UserError, match=r"theta=0\.06 has nothing to compare: the model has no category head"):
        ConsistentRanker(plain, Consistency(0.06))


def test_it_stands_in_the_table_with_consistent_paths_and_is_reinforced(stage, trained, tiny_dataset, tmp_path):
    report = ["--dataset", str(tiny_dataset), "--models", str(trained), "--max_rows", "8", "--num_beams", "20",
              "--precision", "fp32", "--exact", "false", "--control", "false", "--baselines", "false"]  # fmt: skip
    done = stage("eval_ranking", *report, "--theta", "0.001", "--output_dir", str(tmp_path / "report"))
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    plain, consistent = metrics["rows"]
    assert [row["name"] for row in metrics["rows"]] == ["sft, beam 20", "sft, beam 20, consistent paths"]
    assert consistent["valid_ratio"] == 1
    assert "theta=0.001 pruned" in consistent["note"]
    assert consistent["note"].endswith("for unchecked lists")
    assert "theta=0.001 pruned" in done.stdout + done.stderr
    assert [(pair["a"], pair["b"]) for pair in metrics["paired"]] == [(consistent["name"], plain["name"])] * 2
    assert read_manifest(tmp_path / "report").config["theta"] == 0.001
    stage("eval_ranking", *report, "--theta", "1", "--output_dir", str(tmp_path / "all"))
    plain, consistent = json.loads((tmp_path / "all" / "metrics.json").read_text())["rows"]
    assert consistent["metrics"] == plain["metrics"]
    stage("grpo", "--model", str(trained), "--dataset", str(tiny_dataset), "--output_dir", str(tmp_path / "grpo"),
          "--rewards", "{exact: 1.0}", "--max_steps", "2", "--num_generations", "4",
          "--per_device_train_batch_size", "8", "--valid_rows", "4", "--eval_steps", "2", *SHORT)  # fmt: skip
    assert read_manifest(tmp_path / "grpo").facts["setting"]["policy"] == "parallel_codes"
