"""The judgement as a user launches it: what it leaves, what `recommend` makes of it, what it refuses."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from reasonrec.data_gen.schema import Dataset
from reasonrec.data_gen.tasks.choice import validation_sample
from reasonrec.recipes.models.verdict import FACT, UNMEASURED, Verdict
from reasonrec.recipes.recommender import Recommender
from reasonrec.tokenizers.artefact import read_manifest

FLAGS = ["--max_chain", "6", "--num_beams", "20", "--precision", "fp32"]


@pytest.fixture(scope="module")
def judged(adapter: Path, stage, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A model that never saw a chain, judged against itself: thinking can only cost it."""
    out = tmp_path_factory.mktemp("judge") / "judged"
    return out, stage(
        "judge_reasoning", "--model", str(adapter), "--direct", str(adapter), *FLAGS, "--output_dir", str(out)
    ).stdout


@pytest.fixture
def asked(judged: tuple[Path, str], stage) -> Callable[..., str]:
    ids = Recommender.from_pretrained(judged[0]).policy.catalogue.item_ids

    def ask(folder: Path, *more: str) -> str:
        words = ["--model", str(folder), "--history", ids[0], "--k", "3", "--mode", "reasoning", "--max_chain", "5"]
        return str(stage("recommend", *words, "--precision", "fp32", *more).stdout)

    return ask


def test_the_model_stays_as_it_was_and_a_verdict_goes_with_it(
    judged: tuple[Path, str], adapter: Path, tiny_dataset: Path
) -> None:
    manifest, before = read_manifest(judged[0]), read_manifest(adapter)
    assert manifest.files == before.files
    assert manifest.inputs == {**before.inputs, "model": before.hash, "direct": before.hash}
    verdict = Verdict.stored(manifest)
    assert verdict is not None
    assert str(verdict) in judged[1]
    assert verdict.cases == Dataset.load(tiny_dataset).valid.height
    assert verdict.direct == before.hash
    assert verdict.tokens[0] == verdict.tokens[1] > 0
    assert verdict.gain_low <= verdict.gain
    assert verdict.ndcg_low <= verdict.ndcg
    assert not verdict.offered
    assert Recommender.from_pretrained(judged[0]).verdict == verdict
    del manifest.facts[FACT]
    assert manifest.facts == before.facts


def test_two_processes_share_what_the_models_read(adapter: Path, stage, stage_on_two, tmp_path: Path) -> None:
    """To the last bit, of sampled chains and of a last batch that is not full, too."""
    flags = ["--model", str(adapter), "--direct", str(adapter), *FLAGS, "--chains", "2", "--batch_size", "12"]
    alone = stage("judge_reasoning", *flags, "--output_dir", str(tmp_path / "one" / "judged")).stdout
    shared = stage_on_two("judge_reasoning", *flags, "--output_dir", str(tmp_path / "two" / "judged")).stdout
    for said in ("nats: ", "precision: "):
        assert shared.count(said) == alone.count(said), "one process speaks"
    one, two = (read_manifest(tmp_path / name / "judged") for name in ("one", "two"))
    assert (two.facts[FACT], two.files) == (one.facts[FACT], one.files)


def test_thinking_that_does_not_pay_is_not_offered(judged: tuple[Path, str], adapter: Path, asked) -> None:
    said = asked(judged[0])
    assert "thinking does not pay on" in said
    assert "thought: " not in said
    assert said.count("log-prob") == 3
    assert UNMEASURED in asked(adapter)
    assert "thought: " in asked(judged[0], "--unproven")


def test_thinking_that_pays_is_offered(judged: tuple[Path, str], asked, edit_manifest, tmp_path: Path) -> None:
    shutil.copytree(judged[0], tmp_path / "pays")
    lows = {"gain": 0.2, "gain_low": 0.1, "ndcg": 0.01, "ndcg_low": 0.0}
    edit_manifest(tmp_path / "pays", lambda manifest: manifest.facts[FACT].update(lows))
    said = asked(tmp_path / "pays")
    assert "thought: " in said
    assert "instead" not in said


def test_cases_that_a_training_looked_at_are_not_asked_again(
    adapter: Path, stage, edit_manifest, tiny_dataset: Path, tmp_path: Path
) -> None:
    """What `valid_rows` of both trainings drew; all but a few are left out here."""
    shutil.copytree(adapter, tmp_path / "looked")
    dataset = Dataset.load(tiny_dataset)
    valid = dataset.valid
    edit_manifest(tmp_path / "looked", lambda manifest: manifest.config.update(valid_rows=valid.height - 4))
    left = valid.height - validation_sample(dataset, valid.height - 4, "row").height
    stage(
        "judge_reasoning", "--model", str(tmp_path / "looked"), "--direct", str(adapter), *FLAGS,
        "--output_dir", str(tmp_path / "judged"),
    )  # fmt: skip
    verdict = Verdict.stored(read_manifest(tmp_path / "judged"))
    assert verdict is not None
    assert verdict.cases == left == 4


def test_mistakes_are_named(
    adapter: Path, other_world: tuple[Path, Path], edit_manifest, refused_by: Callable[..., str], tmp_path: Path
) -> None:
    refused = partial(refused_by, "judge_reasoning")
    pair = ["--model", str(adapter), "--direct", str(adapter)]
    assert "but dataset " in refused(*pair, "--dataset", str(other_world[0]))
    shutil.copytree(adapter, tmp_path / "all")
    edit_manifest(tmp_path / "all", lambda manifest: manifest.config.update(valid_rows=10**6))
    assert "too few to judge by" in refused("--model", str(tmp_path / "all"), "--direct", str(adapter))
    shutil.copytree(adapter, tmp_path / "fused")
    edit_manifest(tmp_path / "fused", lambda manifest: manifest.facts.update(pool={}))
    assert "has experts" in refused("--model", str(tmp_path / "fused"), "--direct", str(adapter))
