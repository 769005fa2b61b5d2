"""Nothing held out reaches training: poison it, and everything that trains stays the same, byte for byte."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from reasonrec.data_gen.descriptions import Describer, item_texts
from reasonrec.data_gen.schema import ROWS, Dataset
from reasonrec.data_gen.tasks.choice import TaskChoice
from reasonrec.data_gen.tasks.mixture import PlanConfig, make_plan
from reasonrec.data_gen.tasks.render import Material
from reasonrec.data_gen.tasks.rl_prompts import PromptWindow, RlPrompts
from reasonrec.recipes import describe, prepare
from reasonrec.recipes.index_items import IndexConfig
from reasonrec.recipes.indexing import build, item_vectors
from reasonrec.recipes.models.checkpoint import Setting
from reasonrec.recipes.policies.base import Policy, build_policy
from reasonrec.recipes.rankers.baselines import TrainLog
from reasonrec.recipes.trainers.soft_targets import SoftTargets
from reasonrec.tokenizers.artefact import write_manifest
from reasonrec.tokenizers.index import ItemIndex
from reasonrec.tokenizers.output import resume_folder, start_folder

TASKS = {"seqrec": 1.0, "item2index": 1.0, "index2item": 1.0, "fusionseqrec": 1.0, "item2item": 1.0}


def poison(dataset: Path, folder: Path, how: str) -> Path:
    """A copy of a dataset whose held-out cases are other ones, or gone."""
    shutil.copytree(dataset, folder)
    facts = Dataset.load(dataset).facts
    rng = np.random.default_rng(9)
    for split in ("valid", "test"):
        path = folder / f"{split}.parquet"
        rows = pl.read_parquet(path)
        before = rows.clone()
        if how == "gone":
            rows = rows.clear()
        else:
            n = facts["n_items"]
            lists = [rng.integers(0, n, int(rng.integers(1, 20))).tolist() for _ in range(rows.height)]
            rows = rows.with_columns(
                pl.Series("history", lists, dtype=ROWS["history"]),
                pl.Series("target", rng.integers(0, n, rows.height), dtype=ROWS["target"]),
                pl.Series("masked", [[1]] * rows.height, dtype=ROWS["masked"]),
            )
        assert not rows.equals(before)
        rows.write_parquet(path)
    write_manifest(folder, kind="dataset", config={}, facts=facts)
    return folder


@pytest.fixture(scope="module", params=["scrambled", "gone"])
def pair(request, tiny_dataset, tmp_path_factory) -> tuple[Dataset, Dataset]:
    folder = poison(tiny_dataset, tmp_path_factory.mktemp("poisoned") / "dataset", request.param)
    clean, poisoned = Dataset.load(tiny_dataset), Dataset.load(folder)
    assert clean.manifest.hash != poisoned.manifest.hash
    return clean, poisoned


def policy_of(dataset: Dataset, index: Path, base: Path, folder: Path) -> Policy:
    """The index belongs to the clean dataset; its copy says that it belongs to this one."""
    shutil.copytree(index, folder)
    write_manifest(folder, kind="index", config={}, inputs={"dataset": dataset.manifest.hash})
    setting = Setting(str(base), "lora", "History:{history}", chat=False, system=None, max_history=5)
    return build_policy(dataset.catalogue(ItemIndex.load(folder)), setting)


def test_plan_examples_and_row_texts(pair, tiny_index, tiny_base, tmp_path):
    made = []
    for number, dataset in enumerate(pair):
        policy = policy_of(dataset, tiny_index, tiny_base, tmp_path / str(number))
        examples = policy.examples(dataset.train, one_per_prefix=False)
        lengths = np.array([len(ids) for ids in policy.prompts.item_token_ids])
        config = PlanConfig(TASKS, max_history=5, one_per_prefix=False, passes=1.5, batch_size=8, seed=0)
        plan = make_plan(config, Material(examples.sequences, lengths))
        rows = policy.catalogue.texts("title", "category", "brand")
        made.append((plan, examples(plan.to_dict(as_series=False)), rows, examples.titles, examples.texts))
    (plan, *others), (poisoned_plan, *poisoned_others) = made
    assert plan.equals(poisoned_plan)
    assert others == poisoned_others
    assert len(others[0]["input_ids"]) == plan.height > 400


def test_the_codes_of_whole_history_examples_are_training_windows(tiny_dataset, tiny_index, tiny_base, tmp_path):
    """The other way round: decode what is shown, and find every item sequence inside a training sequence."""
    dataset = Dataset.load(tiny_dataset)
    policy = policy_of(dataset, tiny_index, tiny_base, tmp_path / "index")
    config = PlanConfig({"seqrec": 1.0}, max_history=5, one_per_prefix=False, passes=1.0, batch_size=8, seed=0)
    lengths = np.array([len(ids) for ids in policy.prompts.item_token_ids])
    examples = policy.examples(dataset.train, one_per_prefix=False)
    plan = make_plan(config, Material(examples.sequences, lengths))
    item_of = {tuple(ids): item for item, ids in enumerate(policy.prompts.item_token_ids)}
    train = {(user, at): item for user, items in enumerate(dataset.train["items"]) for at, item in enumerate(items)}
    for source, start, labels in zip(
        plan["source"], plan["start"], examples(plan.to_dict(as_series=False))["labels"], strict=True
    ):
        tokens, word = [label for label in labels if label != -100], []
        for token in tokens:
            word.append(token)
            if tuple(word) in item_of:
                assert train.pop((source, start)) == item_of[tuple(word)]
                start, word = start + 1, []
        assert not word
    assert not train, "every training interaction was shown"


def test_counts_popularity_and_neighbours(pair):
    clean, poisoned = pair
    assert clean.items.equals(poisoned.items)
    assert clean.items["train_count"].sum() == clean.train["items"].list.len().sum()
    first, second = (TrainLog.of(dataset) for dataset in pair)
    assert np.array_equal(first.counts, second.counts)
    assert np.array_equal(first.counts, clean.items["train_count"].to_numpy())
    assert np.array_equal(np.stack(first.pairs(3)), np.stack(second.pairs(3)))


def test_what_rewards_look_ahead_to(pair):
    """The targets behind each prompt's are the rest of its training sequence, whatever is held out behind that."""
    told = []
    for dataset in pair:
        prompts = RlPrompts.from_train(dataset.train, PromptWindow(), list)
        told.append([prompts.later(np.arange(len(prompts)), places) for places in range(1, 6)])
    assert np.array_equal(*told)
    behind = np.stack(told[0])
    for number, (source, position) in enumerate(zip(prompts.source, prompts.position, strict=True)):
        rest = dataset.train["items"][int(source)][int(position) + 1 :].to_list()[:5]
        there = behind[:, number]
        assert prompts.target[there[there >= 0]].tolist() == rest
        assert (there[: len(rest)] >= 0).all()
    assert (behind < 0).any()
    assert (behind >= 0).any()


@pytest.mark.parametrize("teacher", ["co_visitation", "sasrec", "popularity", "uniform"])
def test_soft_targets(pair, tiny_index, tiny_base, tmp_path, teacher):
    """What a training is told at every place of its sequences, byte for byte."""
    soft = SoftTargets.parse({"teacher": teacher, "top_k": 6}, "semantic_id")
    told = []
    for number, dataset in enumerate(pair):
        policy = policy_of(dataset, tiny_index, tiny_base, tmp_path / str(number))
        examples = policy.examples(dataset.train, one_per_prefix=False)
        plan = TaskChoice(max_history=5).plan(examples, passes=0.4, batch_size=8, seed=0)
        start_folder(resume_folder(tmp_path / f"out{number}"))
        told.append(soft.prepare(dataset, policy, examples, plan, tmp_path / f"out{number}", 0).score)
    assert np.array_equal(told[0].items, told[1].items)
    assert np.array_equal(told[0].shares, told[1].shares)
    assert told[0].shares.sum() > 100


def fake_embeddings(fields, weights, model_name, **_) -> np.ndarray:
    """From the texts alone, as an encoder's are."""
    rows = [np.frombuffer(text.ljust(64)[:64].encode("ascii", "replace"), dtype=np.uint8) for text in fields["joined"]]
    vectors = np.stack(rows).astype(np.float32) - 80
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("collaboration", [0, 2])
def test_the_index(pair, tmp_path, monkeypatch, collaboration):
    monkeypatch.setattr(item_vectors, "embed_items", fake_embeddings)
    for number, dataset in enumerate(pair):
        folder = tmp_path / str(number)
        folder.mkdir()
        config = IndexConfig(
            str(dataset.path), str(folder), codebook_sizes=[6, 4], quantizer_options={"n_init": 1, "max_iter": 10},
            collaboration=collaboration,
        )  # fmt: skip
        build.build(config, dataset, folder)
    names = sorted(p.name for p in (tmp_path / "0").iterdir())
    assert {"index.safetensors", "quantizer.safetensors", "health.json"} <= set(names)
    for name in names:
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "1" / name).read_bytes(), name


# The stage that holds out.

USERS, ITEMS, PER_USER = 14, 9, 6
SPLITS = {
    "leave_one_out": "split: leave_one_out\nmask_history: true\n",
    "time": "split: time\nvalid_from: '2024-01-05'\ntest_from: '2024-01-06'\nduplicates: keep\n",
}


def shop(folder: Path, held_out: dict[int, tuple[int, int]], split: str, *, rating: float = 5.0) -> Path:
    """A log in which each user's last two interactions, on January 5 and 6, are given."""
    folder.mkdir()
    rows = ["user_id,item_id,timestamp,rating,review"]
    for user in range(USERS):
        items = [(user * 2 + step) % ITEMS for step in range(PER_USER - 2)]
        rows += [
            f"{user},{item},2024-01-0{day},4,review of user {user} on day {day}" for day, item in enumerate(items, 1)
        ]
        last = zip((5, 6), held_out[user], strict=True)
        rows += [f"{user},{item},2024-01-0{day},{rating},secret of user {user} on thing {item}" for day, item in last]
    (folder / "log.csv").write_text("\n".join(rows) + "\n")
    titles = [f"{item},thing number {item}" for item in range(ITEMS)]
    (folder / "items.csv").write_text("\n".join(["item_id,title", *titles]) + "\n")
    (folder / "prepare.yaml").write_text(
        f"source: tables\noutput_dir: {folder}/dataset\nname: shop\ninteractions: {folder}/log.csv\n"
        f"items: {folder}/items.csv\n{SPLITS[split]}interaction_columns: {{review: review}}\n"
    )
    return folder


def fresh_items(shift: int) -> dict[int, tuple[int, int]]:
    """Two items for each user that are new to them; another pair for each shift."""
    new = {u: [i for i in range(ITEMS) if (i - u * 2) % ITEMS >= PER_USER - 2] for u in range(USERS)}
    return {u: (items[shift % len(items)], items[(shift + 1) % len(items)]) for u, items in new.items()}


def prepared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--config", str(folder / "prepare.yaml")])
    prepare.main()
    return Dataset.load(folder / "dataset")


@pytest.mark.parametrize("split", SPLITS)
def test_prepare(split, tmp_path, monkeypatch, capsys):
    """Other held-out items, ratings and reviews: the same training tables, byte for byte."""
    clean = prepared(shop(tmp_path / "clean", fresh_items(0), split), monkeypatch)
    other = prepared(shop(tmp_path / "other", fresh_items(2), split, rating=1.0), monkeypatch)
    for name in ("items", "users", "train"):
        file = f"{name}.parquet"
        assert (clean.path / file).read_bytes() == (other.path / file).read_bytes(), name
    assert not clean.valid["target"].equals(other.valid["target"])
    assert not clean.test["target"].equals(other.test["target"])
    assert clean.items["train_count"].sum() == USERS * (PER_USER - 2)
    reviews = [review for row in clean.train["reviews"] for review in row]
    assert len(reviews) == USERS * (PER_USER - 2)
    for table in (clean.items, clean.users, clean.train, clean.valid, clean.test):
        assert "secret" not in str(table.to_dict(as_series=False)), "a held-out review was kept"


@pytest.mark.parametrize("split", SPLITS)
def test_descriptions(split, tmp_path, monkeypatch):
    """What is made of reviews, and what an LLM is shown of them, knows none that is held out."""
    made = []
    for name, shift in (("clean", 0), ("other", 2)):
        dataset = prepared(shop(tmp_path / name, fresh_items(shift), split), monkeypatch)
        texts = item_texts(dataset, 50, 0)
        assert sum(len(text.reviews) for text in texts) == USERS * (PER_USER - 2)
        assert "secret" not in str([Describer(500).messages(text) for text in texts])
        out = tmp_path / name / "described"
        monkeypatch.setattr(sys, "argv", ["describe.py", "--dataset", str(dataset.path), "--output_dir", str(out)])
        describe.main()
        made.append(Dataset.load(out))
        for table in (made[-1].items, made[-1].users, made[-1].train, made[-1].valid, made[-1].test):
            assert "secret" not in str(table.to_dict(as_series=False)), "a held-out review was kept"
        assert "secret" not in (out / "manifest.json").read_text()
    assert (made[0].path / "items.parquet").read_bytes() == (made[1].path / "items.parquet").read_bytes()
    assert made[0].items["description"].str.contains("review of user").all()
