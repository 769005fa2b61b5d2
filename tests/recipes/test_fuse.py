"""The fusion as a user launches it: what it leaves, what recommends with it, what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from reasonrec.data_gen.histories import UserHistory
from reasonrec.data_gen.schema import Dataset
from reasonrec.recipes.rankers.model import ModelRanker
from reasonrec.recipes.rankers.pool import MODEL
from reasonrec.recipes.recommender import Recommender
from reasonrec.tokenizers.artefact import read_manifest
from reasonrec.tokenizers.errors import UserError

EXPERTS = ["--experts", "{co_visitation: {window: 3}, sasrec: {}}", "--precision", "fp32"]


@pytest.fixture(scope="module")
def fused(adapter: Path, stage, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("fuse") / "fused"
    return out, stage("fuse", "--model", str(adapter), *EXPERTS, "--output_dir", str(out)).stdout


@pytest.fixture(scope="module")
def recommender(fused: tuple[Path, str]) -> Recommender:
    return Recommender.from_pretrained(fused[0], dtype="fp32", device="cpu")


@pytest.fixture(scope="module")
def histories(tiny_dataset: Path) -> list[UserHistory]:
    return UserHistory.of_rows(Dataset.load(tiny_dataset).test)


def test_the_model_stays_as_it_was_and_experts_stand_beside_it(fused: tuple[Path, str], adapter: Path) -> None:
    manifest, before = read_manifest(fused[0]), read_manifest(adapter)
    assert manifest.kind == "adapter"
    assert manifest.inputs == {**before.inputs, "model": before.hash}
    new = {"expert_co_visitation.safetensors", "expert_sasrec.safetensors"}
    assert manifest.files == {**before.files, **{name: manifest.files[name] for name in new}}
    pool = manifest.facts.pop("pool")
    assert manifest.facts == before.facts
    assert pool["weights"].keys() == {MODEL, "co_visitation", "sasrec"}
    nats = pool["valid_nats"]
    assert nats["model + co_visitation + sasrec"] < nats["model"], "fitted on 15 users, judged on 15 others"
    assert f"{nats['co_visitation + sasrec']:.3f}  co_visitation + sasrec" in fused[1]
    assert "the model adds " in fused[1]
    assert "## Experts" in (fused[0] / "README.md").read_text(encoding="utf-8")


def test_two_processes_share_what_the_model_reads(adapter: Path, stage, stage_on_two, tmp_path: Path) -> None:
    """To the last bit, of a last batch that is not full and in a round that lacks one, too."""
    flags = ["--model", str(adapter), *EXPERTS, "--batch_size", "12"]
    stage("fuse", *flags, "--output_dir", str(tmp_path / "one" / "fused"))
    done = stage_on_two("fuse", *flags, "--output_dir", str(tmp_path / "two" / "fused"))
    assert done.stdout.count("the model adds") == done.stdout.count("precision: fp32") == 1, "one process speaks"
    one, two = (read_manifest(tmp_path / name / "fused") for name in ("one", "two"))
    assert (two.facts["pool"], two.files, two.hash) == (one.facts["pool"], one.files, one.hash)


def test_it_recommends_scores_and_follows_a_user(recommender: Recommender, histories: list[UserHistory]) -> None:
    n = recommender.policy.catalogue.n_items
    items, scores = recommender.rank(histories, k=n, num_beams=n, repeats=False)
    for row, history in zip(items, histories, strict=True):
        left = n - len(history.masked)
        assert sorted(row[:left]) == sorted(set(range(n)) - set(history.masked.tolist()))
        assert (row[left:] == -1).all()
    np.testing.assert_allclose(np.exp(scores).sum(1), 1, atol=1e-4)
    everything = np.tile(np.arange(n), (len(histories), 1))
    scored = recommender.score(histories, everything, repeats=False)
    some = items[:, :10]
    np.testing.assert_allclose(np.take_along_axis(scored, some, 1), scores[:, :10], atol=1e-3)
    for row, history in zip(scored, histories, strict=True):
        assert np.isneginf(row[history.masked]).all()
    session = recommender.session(histories[0], repeats=False)
    np.testing.assert_allclose(session.search(k=5).scores[0].numpy(), scores[0, :5], atol=1e-3)
    narrow = recommender.rank(histories, k=5, num_beams=5, repeats=False, batch_size=3)
    np.testing.assert_allclose(narrow[1], scores[:, :5], atol=1e-3)


def test_without_its_experts_it_is_the_model(
    fused: tuple[Path, str], recommender: Recommender, adapter: Path, histories: list[UserHistory]
) -> None:
    plain = Recommender.from_pretrained(adapter, dtype="fp32", device="cpu").rank(histories, k=10)
    alone = recommender.rank(histories, k=10, pooled=False)
    left_out = Recommender.from_pretrained(fused[0], dtype="fp32", device="cpu", without=["sasrec", "co_visitation"])
    assert left_out.pool is None
    for found in (alone, left_out.rank(histories, k=10)):
        assert (found[0] == plain[0]).all()
    one = Recommender.from_pretrained(fused[0], dtype="fp32", device="cpu", without=["sasrec"])
    assert one.pool is not None
    assert one.pool.experts.keys() == {"co_visitation"}
    assert (one.rank(histories, k=10)[0] != recommender.rank(histories, k=10)[0]).any()


def test_it_needs_no_dataset_and_no_stage_is_surprised(
    fused: tuple[Path, str], stage, tmp_path: Path, recommender: Recommender
) -> None:
    shutil.copytree(fused[0], tmp_path / "moved")
    base = read_manifest(fused[0]).facts["setting"]["base_model"]
    moved = [str(tmp_path / "moved"), "--base_model", str(recommender.setting.base_model or base)]
    history = ["--history", recommender.items.ids([3])[0], "--k", "3", "--precision", "fp32"]
    said = stage("recommend", "--model", *moved, *history).stdout
    assert "pooled with co_visitation, sasrec" in said
    assert said.count("log-prob") == 3


def test_the_table_shows_what_the_model_adds(
    fused: tuple[Path, str], stage, tiny_dataset: Path, tmp_path: Path
) -> None:
    flags = ["--dataset", str(tiny_dataset), "--models", str(fused[0]), "--num_beams", "20", "--precision", "fp32"]
    stage("eval_ranking", *flags, "--output_dir", str(tmp_path / "report"))
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    modes = {row["name"]: row["mode"] for row in metrics["rows"]}
    pooled = "fused, exact search, with its experts"
    assert modes[pooled] == modes["fused, exact search"] == "direct"
    for name in ("its experts alone", "sasrec alone", "co_visitation alone"):
        assert modes[f"fused, {name}"] == "baseline"
    assert modes["fused, a second SASRec in place of its model"] == "baseline"
    assert modes["fused, its model reads another user's history"] == "control"
    claimed = {pair["b"] for pair in metrics["paired"] if pair["a"] == pooled}
    controls = ("its experts alone", "a second SASRec in place of its model", "its model reads another user's history")
    assert claimed >= {f"fused, {name}" for name in controls}
    assert all(row["valid_ratio"] == 1 for row in metrics["rows"])


def test_ranker_and_scores_agree(recommender: Recommender, tiny_dataset: Path) -> None:
    rows = Dataset.load(tiny_dataset).test.head(6)
    ranker = ModelRanker(recommender, "pooled", pooled=True)
    items = ranker.rank(rows, 8)
    scores = ranker.score(rows, items)
    assert (np.diff(scores, axis=1) <= 1e-4).all()


@pytest.fixture
def refused(refused_by: Callable[..., str]) -> Callable[..., str]:
    return partial(refused_by, "fuse")


def test_mistakes_are_named(refused, fused: tuple[Path, str], adapter: Path, other_world: tuple[Path, Path]) -> None:
    assert "has experts already" in refused("--model", str(fused[0]))
    assert "did you mean 'sasrec'?" in refused("--model", str(adapter), "--experts", "{sasrek: {}}")
    other = refused("--model", str(adapter), "--dataset", str(other_world[0]))
    assert read_manifest(other_world[0]).hash[:12] in other


def test_a_folder_that_lost_an_expert_is_refused(fused: tuple[Path, str], tmp_path: Path, edit_manifest) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(fused[0], broken)
    (broken / "expert_sasrec.safetensors").unlink()
    with pytest.raises(UserError, match="expert_sasrec"):
        Recommender.from_pretrained(broken)
    edit_manifest_of = read_manifest(fused[0])
    assert "expert_sasrec.safetensors" in edit_manifest_of.files
    with pytest.raises(UserError, match=r"no expert 'text' to leave out; it has co_visitation, sasrec"):
        Recommender.from_pretrained(fused[0], without=["text"])


@pytest.mark.parametrize(
    "change",
    [
        lambda pool: pool["weights"].pop("sasrec"),
        lambda pool: pool["weights"].update(sasrec=[1.0]),
        lambda pool: pool["weights"].update(sasrec=[-1.0, 0.0, 0.0]),
        lambda pool: pool["experts"]["sasrec"].update(hidden="wide"),
        lambda pool: pool["experts"]["sasrec"].update(hidden=10**9),
        lambda pool: pool["experts"]["sasrec"].update(layers=10**9),
        lambda pool: pool["experts"]["co_visitation"].update(temper=2.0),
    ],
)
def test_what_no_fusion_writes_is_refused(fused: tuple[Path, str], tmp_path: Path, edit_manifest, change) -> None:
    shutil.copytree(fused[0], tmp_path / "edited")
    edit_manifest(tmp_path / "edited", lambda manifest: change(manifest.facts["pool"]))
    with pytest.raises(UserError, match="its experts are not what this kit writes"):
        Recommender.from_pretrained(tmp_path / "edited", dtype="fp32", device="cpu")
