"""The synthetic task: a small decoder that `recipes/sft.py` trains comes near the best possible ranking.

The world is half as wide as the default one, so that a single CPU thread learns it in about a minute; all users are
drawn from it, hence a ranking is scored by its true probabilities, without the noise of drawn targets.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from reasonrec.data_gen.readers.synthetic import SyntheticWorld, WorldConfig, make_synthetic
from reasonrec.data_gen.schema import Dataset, write_dataset
from reasonrec.recipes.recommender import Recommender
from reasonrec.tokenizers.artefact import staged
from reasonrec.tokenizers.index import build_index

ROOT = Path(__file__).parents[1]
WORLD = WorldConfig(seed=0, clusters=8, items_per_cluster=16, personas=4)
NEAR = 0.88  # of the optimum


def scratch_base(folder: Path, texts: list[str]) -> Path:
    """A decoder of two layers without pre-training; the benchmarks' own, read by its path as they are no package."""
    spec = importlib.util.spec_from_file_location("scratch_base", ROOT / "tests" / "benchmarks" / "scratch_base.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.make_scratch_base(folder, texts, hidden=64, layers=2, heads=4, initializer_range=0.1)
    return Path(made)


def planted_index(dataset: Dataset, folder: Path) -> None:
    """Items by cluster, sub-cluster and variant: 8 × 4 × 4, no two alike."""
    cluster, member = np.divmod(np.arange(dataset.n_items), WORLD.items_per_cluster)
    codes = np.stack([cluster, *np.divmod(member, 4)], axis=1)
    with staged(folder, kind="index", config={}, inputs={"dataset": dataset.manifest.hash}) as (work, _):
        build_index(codes, [WORLD.clusters, WORLD.items_per_cluster // 4, 4]).save(work)


def persona_blind(world: SyntheticWorld, histories: list[list[int]]) -> np.ndarray:
    """The best ranking of who knows the chain of clusters and the average taste, but not whose history it is."""
    average = world.preferences.mean(axis=0)
    chances = [world.transitions[world.cluster_of[history[-1]]][world.cluster_of] * average for history in histories]
    return np.argsort(-np.stack(chances), axis=1, kind="stable")[:, :10]


@pytest.mark.slow
def test_supervised_training_comes_near_the_optimum(tmp_path: Path) -> None:
    with staged(tmp_path / "dataset", kind="dataset", config={}) as (work, facts):
        facts.update(write_dataset(work, make_synthetic(WORLD, train_users=32_000, held_out_users=500)))
    dataset = Dataset.load(tmp_path / "dataset")
    planted_index(dataset, tmp_path / "index")
    base = scratch_base(tmp_path / "base", dataset.items["title"].to_list())
    flags = {
        "dataset": dataset.path,
        "index": tmp_path / "index",
        "model": base,
        "output_dir": tmp_path / "sft",
        "method": "full",
        "per_device_train_batch_size": 128,
        "num_train_epochs": 3.5,
        "learning_rate": 5e-3,
        "warmup_steps": 0.1,
        "adam_beta2": 0.98,
        "precision": "fp32",
        "activation_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "sft.py"), *words],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr

    recommender = Recommender.from_pretrained(tmp_path / "sft", dtype=torch.float32)
    histories = dataset.test["history"].to_list()
    ranking = recommender.rank(histories, k=10, num_beams=20, batch_size=128)[0]
    assert (ranking >= 0).all(), "every recommendation is an item"
    world = SyntheticWorld.from_facts(dataset.facts)
    optimum = world.optimum(histories)
    reached = world.expected_metrics(ranking, histories)
    blind = world.expected_metrics(persona_blind(world, histories), histories)
    for name, best, got, without in zip(("HR@10", "NDCG@10"), optimum, reached, blind, strict=True):
        print(f"{name}: {got:.4f}, optimum {best:.4f} ({got / best:.1%}), persona-blind {without:.4f}")
        assert NEAR * best <= got <= best
        assert without < NEAR * best, "the bound asks for more than the chain of clusters"
