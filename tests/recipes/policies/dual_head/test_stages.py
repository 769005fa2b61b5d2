"""Stage by stage with the dual head, as a user launches them, and what goes wrong on the way."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file

from reasonrec.data_gen.schema import Dataset
from reasonrec.recipes.args import run
from reasonrec.recipes.models.checkpoint import Setting
from reasonrec.recipes.policies.base import build_policy
from reasonrec.recipes.policies.dual_head.answers import ITEM_BASE
from reasonrec.recipes.publish import PublishConfig, publish
from reasonrec.recipes.recommender import Recommender
from reasonrec.tokenizers.artefact import read_manifest
from reasonrec.tokenizers.catalogue import SCHEMA, Catalogue
from reasonrec.tokenizers.errors import UserError

SHORT = ["--precision", "fp32", "--report_to", "none", "--activation_checkpointing", "false", "--save_steps", "4"]
LORA = ["--method", "lora", "--lora_r", "4", "--max_history", "6", "--learning_rate", "5e-3"]


@pytest.fixture(scope="module")
def flags(tiny_base: Path, tiny_dataset: Path) -> list[str]:
    return ["--dataset", str(tiny_dataset), "--model", str(tiny_base), "--policy", "dual_head", *LORA, *SHORT]


@pytest.fixture(scope="module")
def trained(stage, flags, tmp_path_factory) -> Path:
    """A dual head that was aligned for a moment, directly and with chains."""
    root = tmp_path_factory.mktemp("r2ec")
    dataset = flags[1]
    stage("synthesize", "--dataset", dataset, "--rows", "40", "--valid_rows", "10", "--max_history", "6",
          "--label_field", "category", "--output_dir", str(root / "traces"))  # fmt: skip
    stage("sft", *flags, "--tasks", "{seqrec: 1, reason: 0.5}", "--traces", str(root / "traces"),
          "--mention", "titles", "--num_train_epochs", "1", "--per_device_train_batch_size", "16",
          "--policy_options", "{refresh_steps: 4, item_tokens: 12}",
          "--output_dir", str(root / "sft"))  # fmt: skip
    return root / "sft"


def test_no_index_no_new_tokens_and_a_table(trained, tiny_dataset):
    manifest = read_manifest(trained)
    assert "index" not in manifest.inputs
    assert manifest.facts["setting"]["policy"] == "dual_head"
    names = {path.name for path in trained.iterdir()}
    assert {"adapter_model.safetensors", "policy.safetensors", "catalogue.parquet"} <= names
    assert "index.safetensors" not in names
    assert all("lora" in name for name in load_file(trained / "adapter_model.safetensors"))
    recommender = Recommender.from_pretrained(trained, dtype="fp32", device="cpu")
    stored = load_file(trained / "policy.safetensors")["items"]
    assert torch.equal(recommender.policy.answers.table, stored)
    recommender.policy.refresh(recommender.model)
    torch.testing.assert_close(recommender.policy.answers.table, stored, atol=1e-4, rtol=0)
    log = json.loads((trained / "train_metrics.json").read_text())["log"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < losses[0]


def test_it_recommends_scores_and_follows_a_user(trained, tiny_dataset, stage):
    recommender = Recommender.from_pretrained(trained, dtype="fp32", device="cpu")
    histories = [history[-6:] for history in Dataset.load(tiny_dataset).test["history"].to_list()[:6]]
    items, scores = recommender.rank(histories, k=48)
    assert [sorted(row) for row in items.tolist()] == [list(range(48))] * 6
    np.testing.assert_allclose(np.exp(scores).sum(1), 1, atol=1e-4)
    np.testing.assert_allclose(recommender.score(histories, items), scores, atol=1e-4)
    more = recommender.rank(histories[:1], k=60, num_beams=60)[0][0].tolist()
    assert more == [*items[0].tolist(), *[-1] * 12], "a list longer than the catalogue"
    alone, alone_scores = recommender.rank(histories, k=5, batch_size=1)
    np.testing.assert_allclose(alone_scores, scores[:, :5], atol=1e-4)
    np.testing.assert_allclose(recommender.score(histories, alone), alone_scores, atol=1e-4)
    # Other batches round otherwise: neighbours closer than that may change places, and nobody else.
    apart = np.pad(np.diff(scores[:, :6]) < -5e-5, ((0, 0), (1, 0)), constant_values=True)
    settled = apart[:, :-1] & apart[:, 1:]
    assert settled.mean() > 0.5
    assert (alone == items[:, :5])[settled].all()
    session = recommender.session(histories[0][:3])
    for item in histories[0][3:]:
        session.append(item)
    found = session.search(k=5)
    np.testing.assert_allclose(found.scores[0].numpy(), scores[0, :5], atol=1e-4)
    said = stage("recommend", "--model", str(trained), "--history", recommender.items.ids([3])[0], "--k", "3",
                 "--mode", "reasoning", "--max_chain", "8", "--unproven").stdout  # fmt: skip
    assert said.count("log-prob") == 3
    assert "thought:" in said


def test_it_is_published_with_its_titles_and_merged_with_its_table(trained, tmp_path):
    """Titles are what it reads: they cannot be left out."""
    with pytest.raises(UserError, match="policy=dual_head reads titles: it cannot be published without them"):
        publish(PublishConfig(str(trained), str(tmp_path / "out"), titles=False, dry_run=True))
    publish(PublishConfig(str(trained), str(tmp_path / "merged"), merge=True, dry_run=True))
    before, after = (
        Recommender.from_pretrained(folder, dtype="fp32", device="cpu") for folder in (trained, tmp_path / "merged")
    )
    assert torch.equal(after.policy.answers.table, before.policy.answers.table), "read, and not made anew"
    everything = [list(range(48))]
    np.testing.assert_allclose(after.score([[1, 2, 3]], everything), before.score([[1, 2, 3]], everything), atol=1e-3)


def test_killed_and_run_again_it_ends_the_same(stage, flags, killed_behind, tmp_path):
    """The table is in no checkpoint: behind one it is read anew, in the run that goes on as in the one that does."""
    options = [
        *flags,
        "--num_train_epochs",
        "1",
        "--per_device_train_batch_size",
        "16",
        "--policy_options",
        "{refresh_steps: 3}",
    ]
    stage("sft", *options, "--output_dir", str(tmp_path / "whole"))
    killed_behind(4, "sft", *options, "--output_dir", str(tmp_path / "torn"))
    stage("sft", *options, "--output_dir", str(tmp_path / "torn"))
    whole, torn = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "torn"))
    assert all(torch.equal(whole[name], torn[name]) for name in whole)


def test_recpo_and_the_table_of_both_policies(trained, adapter, tiny_dataset, stage, tmp_path):
    rewards = "{rank: {weight: 0.95, k: 48}, probability: 0.05, length: 0}"
    stage("grpo", "--model", str(trained), "--rewards", rewards, "--algorithm", "recpo", "--mode", "reasoning",
          "--algorithm_options", "{item_weight: 2.0}", "--max_chain", "8", "--max_steps", "2", "--beta", "0",
          "--num_generations", "4", "--per_device_train_batch_size", "16", "--valid_rows", "6", "--eval_steps", "1",
          "--learning_rate", "1e-3", *SHORT, "--output_dir", str(tmp_path / "grpo"))  # fmt: skip
    assert read_manifest(tmp_path / "grpo").facts["reinforced"]["algorithm"] == "recpo"
    stage("eval_ranking", "--dataset", str(tiny_dataset), "--models", str(trained), str(adapter), "--reasoning_models",
          str(tmp_path / "grpo"), "--max_chain", "8", "--max_rows", "8", "--num_beams", "20", "--precision", "fp32",
          "--output_dir", str(tmp_path / "report"))  # fmt: skip
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    rows = {row["name"]: row for row in metrics["rows"]}
    assert all(row["valid_ratio"] == 1 for row in rows.values())
    assert {"sft, exact search", "lora, exact search", "grpo, 1 greedy chain, beam 20"} <= set(rows)
    assert {"grpo, empty chain", "grpo, filler chain", "sft, another user's history"} <= set(rows)
    assert rows["grpo, 1 greedy chain, beam 20"]["tokens_per_user"] > 0


def test_a_table_of_other_weights_is_read_anew(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "moved")
    manifest = read_manifest(trained)
    recommender = Recommender.from_pretrained(trained, dtype="fp32", device="cpu")
    mine = recommender.policy.answers.table.clone()
    file = tmp_path / "moved" / "policy.safetensors"
    save_file({"items": mine * 0}, file, metadata={"weights": "older"})
    recommender.policy.load(tmp_path / "moved", manifest, recommender.model)
    assert "is of other weights than those beside it: the items are read anew" in capsys.readouterr().out
    torch.testing.assert_close(recommender.policy.answers.table, mine, atol=1e-4, rtol=0)


def build(base: Path, titles: list[str], **options):
    """The policy of a catalogue of titles."""
    rows = [
        dict.fromkeys(SCHEMA, "") | {"item_id": f"i{n}", "title": t, "train_count": 1} for n, t in enumerate(titles)
    ]
    catalogue = Catalogue(pl.DataFrame(rows, schema=SCHEMA), "titles", mask_history=False, dataset="")
    chosen = {"policy": "dual_head", "policy_options": options}
    return build_policy(catalogue, Setting(str(base), "full", "History:{history}", False, None, 5, **chosen))


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path) -> Callable[..., str]:
    """Run a stage in this process with words that end in status 2; gives the message."""

    def run_stage(name: str, *words: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *words, "--output_dir", str(tmp_path / "out")])
        with pytest.raises(SystemExit) as stopped:
            run(importlib.import_module(f"reasonrec.recipes.{name}").main)()
        assert stopped.value.code == 2
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
        return line

    return run_stage


def test_mistakes_are_named(refused, trained, adapter, flags, sft_flags, tiny_index):
    assert "policy 'dual_haed' is unknown (did you mean 'dual_head'?)" in refused(
        "sft", *flags, "--policy", "dual_haed"
    )
    assert "the policy dual_head has no option 'tau'; it has temperature, " in refused(
        "sft", *flags, "--policy_options", "{tau: 1}"
    )
    assert "policy=dual_head has no codes: leave it out, or choose one of semantic_id" in refused(
        "sft", *flags, "--index", str(tiny_index)
    )
    no_index = [*sft_flags[:2], *sft_flags[4:], *SHORT]
    assert "policy=semantic_id writes items as codes: set index" in refused("sft", *no_index)
    other = refused("sft", *sft_flags[:4], "--model", str(trained), *LORA, *SHORT)
    assert "policy=semantic_id, but model=" in other
    assert "has dual_head" in other
    codes = refused("grpo", "--model", str(trained), "--rewards", "{rsvr: 1.0}", *SHORT)
    assert "reads predicted_codes, target_codes, depth, which the policy dual_head does not give" in codes
    assert codes.endswith("policies that do are semantic_id, parallel_codes")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature=0 has to be a finite number above 0"),
        ({"similarity": "cos"}, "similarity='cos': choose cosine or dot"),
        ({"over": "all"}, "over='all': choose catalogue or batch"),
        ({"refresh_steps": 0}, "refresh_steps=0 has to be a whole number, at least 1"),
        ({"item_prompt": "Item:"}, "item_prompt='Item:' has to contain {item} once and no other place"),
    ],
)
def test_options_are_checked(tiny_base, options, message):
    with pytest.raises(UserError) as error:
        build(tiny_base, ["a lamp"], **options)
    assert message in str(error.value)


def test_an_item_without_text_is_refused(tiny_base):
    with pytest.raises(UserError, match=r"1 items have no text, such as 'i1': the policy dual_head reads items from"):
        build(tiny_base, ["a lamp", " "])


def test_titles_that_look_like_numbers_of_items_are_words(tiny_base):
    policy = build(tiny_base, [f"{ITEM_BASE} <|im_end|>"])
    ids = policy.prompts.direct([0])
    assert max(ids) < ITEM_BASE
    assert ids.count(policy.eos_id) == 1, "the one that opens the answer"
