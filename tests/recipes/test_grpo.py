"""The stage from end to end on a tiny world: what it writes, killed and resumed, in two processes, its mistakes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from reasonrec.recipes import grpo
from reasonrec.recipes.args import run
from reasonrec.recipes.recommender import Recommender
from reasonrec.tokenizers.artefact import read_manifest, staged
from reasonrec.tokenizers.index import ItemIndex

ROOT = Path(__file__).parents[2]
SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}


def command(stage: str, folder: Path, config: dict) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{Path(config['output_dir']).name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return [str(ROOT / "recipes" / f"{stage}.py"), "--config", str(path)]


def launch(*args, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *command(*args)], capture_output=True, text=True, env=environment(), check=False
    )
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "TRL_EXPERIMENTAL_SILENCE": "0"}


@pytest.fixture(scope="module")
def starts(tiny_base, tiny_dataset, tiny_index, tmp_path_factory) -> dict[str, Path]:
    """A model that was aligned for a moment, in full and as an adapter."""
    folder = tmp_path_factory.mktemp("starts")
    for method in ("full", "lora"):
        launch("sft", folder, {
            "dataset": str(tiny_dataset), "index": str(tiny_index), "model": str(tiny_base), "method": method,
            "output_dir": str(folder / method), "per_device_train_batch_size": 32, "learning_rate": 5e-3,
            "num_train_epochs": 2, "bf16": False, "gradient_checkpointing": False, "report_to": "none",
            "max_history": 6,
        })  # fmt: skip
    return {method: folder / method for method in ("full", "lora")}


def config(model: Path, out: Path, **options) -> dict:
    base = {
        "model": str(model), "output_dir": str(out), "rewards": {"rsvr": 1.0, "exact": 0}, "num_generations": 4,
        "per_device_train_batch_size": 16, "max_steps": 4, "learning_rate": 1e-3, "beta": 0.01, "valid_rows": 10,
        "eval_steps": 2, "save_steps": 1, "bf16": False, "gradient_checkpointing": False, "report_to": "none",
        "disable_tqdm": True, "rollout_budget": 2, "save_total_limit": 9,
    }  # fmt: skip
    return base | options


def log_of(folder: Path) -> list[dict]:
    log = json.loads((folder / "train_metrics.json").read_text())["log"]
    return [{k: v for k, v in entry.items() if "time" not in k} for entry in log if "reward" in entry]


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    name = "model" if (folder / "model.safetensors").is_file() else "adapter_model"
    return load_file(folder / f"{name}.safetensors")


@pytest.fixture(scope="module")
def whole(starts, tmp_path_factory) -> Path:
    """A run that nothing disturbs; the last weights."""
    folder = tmp_path_factory.mktemp("whole")
    done = launch("grpo", folder, config(starts["lora"], folder / "grpo", keep="last"))
    assert "prompts, 4 rollouts each" in done.stdout
    return folder / "grpo"


def test_it_writes_what_sft_writes(whole, starts, tiny_dataset):
    """The same form, so that everything that takes one takes the other."""
    sft, grpo = read_manifest(starts["lora"]), read_manifest(whole)
    assert (grpo.kind, grpo.facts["setting"]) == (sft.kind, sft.facts["setting"])
    assert grpo.inputs == {**sft.inputs, "model": sft.hash}
    assert grpo.config["dataset"] == sft.config["dataset"]
    names = {path.name for path in whole.iterdir()}
    assert {path.name for path in starts["lora"].iterdir()} <= names
    assert not any(name.startswith("checkpoint-") or name in ("best", "ref", "training_args.bin") for name in names)
    before, after = weights_of(starts["lora"]), weights_of(whole)
    assert before.keys() == after.keys()
    assert all(not np.array_equal(before[name], after[name]) for name in before)
    history = pl.read_parquet(tiny_dataset / "valid.parquet")["history"].to_list()[:4]
    items, scores = Recommender.from_pretrained(whole).rank(history, k=5, num_beams=10)
    assert items.shape == (4, 5)
    assert (items >= 0).all()
    assert (np.diff(scores, axis=1) <= 0).all()


def test_the_log_tells_what_was_rolled_out(whole):
    log = log_of(whole)
    assert [entry["step"] for entry in log] == [1, 2, 3, 4]
    expected = {
        "kl", "entropy", "reward", "rewards/rsvr/mean", "rewards/exact/mean", "rollouts/zero_variance",
        "rollouts/zero_variance_permuted", "rollouts/nonzero_advantage", "rollouts/nonzero_advantage_permuted",
        "rollouts/exact_hit", "rollouts/prefix_1", "rollouts/prefix_2", "rollouts/prefix_3",
        "rollouts/tokens_with_gradient",
    }  # fmt: skip
    assert expected <= log[0].keys()
    for entry in log:
        assert entry["rollouts/exact_hit"] <= entry["rollouts/prefix_2"] <= entry["rollouts/prefix_1"]
    assert abs(log[0]["kl"]) < 1e-6
    probes = [e for e in json.loads((whole / "train_metrics.json").read_text())["log"] if "eval_ndcg@10" in e]
    assert [e["step"] for e in probes] == [0, 2, 4]


def test_killed_and_run_again_it_ends_the_same(whole, starts, tmp_path, killed_behind):
    settings = config(starts["lora"], tmp_path / "grpo", keep="last")
    killed_behind(2, "grpo", *command("grpo", tmp_path, settings)[1:])
    assert (tmp_path / "grpo.resume" / "checkpoint-2" / "trainer_state.json").is_file()
    assert not (tmp_path / "grpo").exists()
    done = launch("grpo", tmp_path, settings)
    assert "going on from" in done.stdout
    assert log_of(tmp_path / "grpo") == log_of(whole)
    before, after = weights_of(whole), weights_of(tmp_path / "grpo")
    for name in before:
        assert np.array_equal(before[name], after[name]), name


def test_two_processes_train_on_the_same_groups(starts, torchrun, tmp_path):
    options = {**SGD, "learning_rate": 0.05, "max_steps": 3, "keep": "last", "rewards": {"rsvr": 1.0}}
    launch("grpo", tmp_path, config(starts["full"], tmp_path / "one", **options))
    half = config(starts["full"], tmp_path / "two", **options) | {"per_device_train_batch_size": 8}
    done = torchrun(*command("grpo", tmp_path, half))
    assert "2 process(es)" in done.stdout, "a launcher that starts one would prove nothing"
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    assert len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        assert a["rollouts/groups"] == b["rollouts/groups"]
        for name in a:
            if name != "epoch" and not name.startswith("clip_ratio"):
                assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), name
    before, after = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    for name in before:
        np.testing.assert_allclose(before[name], after[name], atol=1e-6, err_msg=name)


def test_reasoning_mode_and_the_best_weights(starts, tmp_path):
    settings = config(
        starts["lora"], tmp_path / "grpo", mode="reasoning", max_chain=5, max_steps=2, algorithm="grpo",
        rewards={"rsvr": 1.0, "format": 0.1, "likelihood": 0, "collaborative": 0},
    )  # fmt: skip
    launch("grpo", tmp_path, settings)
    entry = log_of(tmp_path / "grpo")[0]
    assert 0 < entry["rollouts/chain_length"] <= 5
    assert {"rewards/collaborative/mean", "rewards/likelihood/mean"} <= entry.keys()
    manifest = read_manifest(tmp_path / "grpo")
    assert manifest.facts["reinforced"]["mode"] == "reasoning"
    assert manifest.facts["step"] in (0, 2)


def test_rewards_that_look_ahead_under_the_ratio_of_whole_completions(starts, tiny_index, tmp_path):
    """REG4Rec's post-training, as far as it goes without a category head; the index has vectors of its codes here."""
    codes = ItemIndex.load(tiny_index)
    with staged(tmp_path / "index", kind="index", config={}) as (folder, _):
        codes.save(folder)
        books = np.random.default_rng(0).normal(size=(2, 6, 8)).astype(np.float32)
        save_file({"codebook_0": books[0, :4], "codebook_1": books[1]}, folder / "quantizer.safetensors")
    ahead = {"horizon": 3, "decay": 0.8}
    rewards = {
        "set_overlap": {"weight": 1.0, **ahead}, "path": {"weight": 1.0, "n": 5, **ahead},
        "category": {"weight": 0.5, **ahead}, "exact": 0,
    }  # fmt: skip
    settings = config(
        starts["lora"], tmp_path / "grpo", rewards=rewards, algorithm="grpo", importance_sampling_level="product",
        num_iterations=2, epsilon=0.15, index=str(tmp_path / "index"), save_steps=2, keep="last", learning_rate=1e-2,
    )  # fmt: skip
    done = launch("grpo", tmp_path, settings)
    short, size = map(
        int, re.search(r"horizon=3: (\d+) of (\d+) prompts have fewer targets left", done.stdout).groups()
    )
    assert 0 < short < size
    assert f"{size} prompts, 4 rollouts each" in done.stdout
    log = log_of(tmp_path / "grpo")
    assert [entry["step"] for entry in log] == [1, 3], "two steps a generation"
    for entry in log:
        assert 0 < entry["rewards/set_overlap/mean"] < 1
        assert 0 < entry["rewards/path/mean"] < 1
        assert 0 < entry["rewards/category/mean"] < 1
        # Any of up to three targets may share a code, so fewer groups are worth the same than exact hits would leave.
        assert entry["rollouts/zero_variance"] < 1
    steps = json.loads((tmp_path / "grpo" / "train_metrics.json").read_text())["log"]
    ratios = [entry["clip_ratio/region_mean"] for entry in steps if "clip_ratio/region_mean" in entry]
    assert ratios[0] == 0
    assert ratios[1] > 0, "the second step on what another policy wrote"
    manifest = read_manifest(tmp_path / "grpo")
    assert manifest.config["index"] == "../index"
    assert manifest.facts["reinforced"]["rewards"]["set_overlap"] == {"weight": 1.0, **ahead}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rewards": {"consistency": 1.0}},
            "reads category_probs, which the policy semantic_id does not give; policies that do are parallel_codes",
        ),
        ({"rewards": {"path": 1.0}}, "an imported index has no embeddings"),
        ({"rewards": {"exact": {"weight": 1.0, "horizon": 0}}}, "horizon=0 has to be a whole number, at least 1"),
        ({"importance_sampling_level": "geometric"}, "importance_sampling_level='geometric'"),
        ({"num_generations": 5}, "num_generations=5 does not divide the 16 rollouts.*choose 2, 4, 8, 16"),
        ({"rewards": {"rsrv": 1.0}}, r"reward 'rsrv' is unknown \(did you mean 'rsvr'\?\)"),
        ({"rewards": {"rsvr": 0}}, "nothing is rewarded"),
        ({"max_step": 3}, "unknown key 'max_step'; did you mean 'max_steps'"),
        ({"algorithm_options": {"bonus_k": 9}}, "k=9 with 4 rollouts"),
        ({"chain_engine": "generate"}, "writes chains, and mode=direct has none: set mode=reasoning"),
        ({"min_history": 50}, "lower min_history"),
        ({"model": "nowhere"}, "nowhere is no artefact"),
    ],
)
def test_mistakes_end_with_one_line(starts, tmp_path, change, message, monkeypatch, capsys):
    line = command("grpo", tmp_path, config(starts["lora"], tmp_path / "grpo") | change)
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit) as ended:
        run(grpo.main)()
    assert ended.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert re.search(message, last), last
    assert not (tmp_path / "grpo").exists()


def test_another_engine_writes_the_chains_in_two_processes(starts, torchrun, tmp_path):
    """As one process whose sampler writes them."""
    options = {**SGD, "mode": "reasoning", "max_chain": 5, "max_steps": 2, "keep": "last", "valid_rows": 0}
    launch("grpo", tmp_path, config(starts["lora"], tmp_path / "one", **options))
    options |= {"chain_engine": "generate", "per_device_train_batch_size": 8}
    done = torchrun(*command("grpo", tmp_path, config(starts["lora"], tmp_path / "two", **options)))
    assert "2 process(es)" in done.stdout
    assert read_manifest(tmp_path / "two").config["chain_engine"] == "generate"
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    assert [entry.pop("rollouts/engine_gap") for entry in two] == pytest.approx([0, 0], abs=1e-4)
    for a, b in zip(one, two, strict=True):
        for name in a.keys() - {"epoch"}:
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), name
