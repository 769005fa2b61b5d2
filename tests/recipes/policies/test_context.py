"""A model that does not fit is found before it is trained, and the value that is named fits."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from reasonrec.data_gen.schema import Dataset
from reasonrec.data_gen.tasks.mixture import PlanConfig, check_texts, make_plan
from reasonrec.data_gen.tasks.render import Material, task_names
from reasonrec.recipes import sft
from reasonrec.recipes.models.checkpoint import Setting
from reasonrec.recipes.models.load import load_tokenizer
from reasonrec.recipes.policies.base import build_policy
from reasonrec.recipes.policies.context import check_context
from reasonrec.recipes.policies.loading import load_fresh
from reasonrec.recipes.rankers.reasoning import Reasoner, Thinking
from reasonrec.recipes.recommender import Recommender
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.index import ItemIndex

LIMIT = 40
KINDS = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": LIMIT},  # learned positions
    "qwen2": {"num_key_value_heads": 2, "max_position_embeddings": LIMIT},  # rotary
    "mistral": {"num_key_value_heads": 2, "sliding_window": LIMIT},  # a window in all layers
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": LIMIT},  # in some of them
}


def make_base(kind: str, tiny_base: Path, folder: Path, **options) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = AutoConfig.for_model(kind, **(common | KINDS.get(kind, {}) | options))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def world(tiny_dataset, tiny_index):
    """Builds a setting with its policy and an untrained model."""

    def build(base: Path, max_history: int):
        setting = Setting(str(base), "full", "History:{history}", False, None, max_history)
        policy = build_policy(Dataset.load(tiny_dataset).catalogue(ItemIndex.load(tiny_index)), setting)
        torch.manual_seed(0)
        return setting, policy, load_fresh(setting, policy)[0]

    return build


def named(refused: pytest.ExceptionInfo, what: str) -> int:
    """The value behind `what` in an error."""
    words = str(refused.value)
    return int(words.split(what, 1)[1].split(",")[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_history_that_is_named_fits_and_one_more_does_not(kind, world, tiny_base, tiny_dataset, tmp_path):
    base = make_base(kind, tiny_base, tmp_path / "base")
    _, policy, model = world(base, 20)
    with pytest.raises(
        UserError, match=r"max_history=20 makes examples of up to \d+ tokens, but the model"
    ) as refused:
        check_context(model, policy, 20, trained=False)
    assert str(LIMIT) in str(refused.value)
    fitting = named(refused, "lower max_history to ")
    with pytest.raises(UserError, match=f"lower max_history to {fitting}"):
        check_context(model, policy, fitting + 1, trained=False)
    setting, policy, model = world(base, fitting)
    check_context(model, policy, fitting, trained=False)
    longest = int(np.argmax([len(ids) for ids in policy.prompts.item_token_ids]))
    recommender = Recommender(policy, model, setting)
    assert (recommender.rank([[longest] * 30], k=5)[0] >= 0).all()
    examples = policy.examples(Dataset.load(tiny_dataset).train, one_per_prefix=False)
    ids, _ = examples.history([longest] * fitting, longest, every_item=True)
    assert LIMIT - 3 < len(ids) <= LIMIT
    model(torch.tensor([ids]))
    with pytest.raises(
        UserError, match=rf"was trained with max_history=20.* train it again with max_history={fitting}"
    ):
        Recommender(policy, model, replace(setting, max_history=20))


def test_a_chain_has_to_fit_as_well(world, tiny_base, tmp_path):
    setting, policy, model = world(make_base("qwen2", tiny_base, tmp_path / "base"), 2)
    reasoner = Reasoner(Recommender(policy, model, setting))
    with pytest.raises(UserError, match=r"max_history=2 and max_chain=128 make up to .*lower max_chain to \d+") as no:
        reasoner([[1, 2]], Thinking())
    room = named(no, "lower max_chain to ")
    assert (reasoner([[1, 2]], Thinking(max_chain=room)).items >= 0).all()
    with pytest.raises(UserError, match=f"lower max_chain to {room - 1}"):  # reinforcement learning reads the end too
        check_context(model, policy, 2, trained=True, max_chain=room, end=1)


def test_a_model_that_is_too_short_for_anything(world, tiny_base, tmp_path):
    _, policy, model = world(make_base("qwen2", tiny_base, tmp_path / "base", max_position_embeddings=6), 5)
    with pytest.raises(UserError, match=r"one item of history makes \d+ tokens, .* at most 6: take another model"):
        check_context(model, policy, 5, trained=False)


@pytest.mark.parametrize(
    ("kind", "why"), [("mamba", "recurrent state"), ("bloom", "rotary or learned"), ("falcon", "rotary or learned")]
)
def test_models_that_could_be_trained_and_never_searched(kind, why, world, tiny_base, tmp_path):
    options = {"mamba": {"state_size": 4}, "falcon": {"alibi": True}}.get(kind, {})
    _, policy, model = world(make_base(kind, tiny_base, tmp_path / "base", **options), 5)
    with pytest.raises(UserError, match=why):
        check_context(model, policy, 5, trained=False)


@pytest.mark.parametrize("task", ["item2index", "index2item", "fusionseqrec"])
def test_the_longest_words_are_found(task, world, tiny_base, tiny_dataset):
    _, policy, _ = world(tiny_base, 6)
    titles = [title * (1 + i % 7) for i, title in enumerate(policy.catalogue.titles)]
    examples = replace(policy.examples(Dataset.load(tiny_dataset).train, one_per_prefix=False), titles=titles)
    lengths = np.array([len(ids) for ids in policy.prompts.item_token_ids])
    config = PlanConfig({"seqrec": 1.0, task: 1.0}, 6, one_per_prefix=False, passes=1, batch_size=8, seed=0)
    plan = make_plan(config, Material(examples.sequences, lengths))
    others = plan.filter(pl.col("task") == task_names().index(task))
    longest = max(map(len, examples(others.to_dict(as_series=False))["input_ids"]))
    check_texts(plan, examples, None)
    check_texts(plan, examples, longest)
    with pytest.raises(
        UserError, match=f"the task {task} has examples of up to {longest} tokens, but .* {longest - 1}:"
    ):
        check_texts(plan, examples, longest - 1)
    with pytest.raises(UserError, match=f"up to {longest} tokens"):
        check_texts(plan, examples, 10)


def test_it_is_said_before_the_training(tiny_base, sft_command, tmp_path):
    base = make_base("gpt2", tiny_base, tmp_path / "base")
    with pytest.raises(UserError, match="max_history=20 makes examples of up to"):
        sft_command("--model", base, "--max_history", 20)
    with pytest.raises(UserError, match="the task fusionseqrec has examples of up to"):
        sft_command("--model", base, "--max_history", 5, "--tasks", "{seqrec: 1, fusionseqrec: 1}")


@pytest.fixture
def sft_command(tiny_dataset, tiny_index, tmp_path, monkeypatch):
    """The stage, in this process."""

    def run(*flags) -> None:
        own = ["--dataset", tiny_dataset, "--index", tiny_index, "--output_dir", tmp_path / "out", "--method", "lora"]
        monkeypatch.setattr(sys, "argv", ["sft.py", *map(str, [*own, "--report_to", "none", *flags])])
        sft.main()

    return run


@pytest.mark.parametrize("pad", [True, False])
def test_a_tokenizer_without_an_end_is_refused(tiny_base, sft_command, tmp_path, pad):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    path = base / "tokenizer_config.json"
    config = json.loads(path.read_text())
    lost = ["eos_token"] if pad else ["eos_token", "pad_token"]
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in lost}))
    with pytest.raises(UserError, match=r"no eos token.*set \"eos_token\" .*it has <\|endoftext\|>, <\|im_start\|>"):
        sft_command("--model", base)
    path.write_text(json.dumps({key: value for key, value in config.items() if key != "pad_token"}))
    assert load_tokenizer(str(base)).pad_token == "<|im_end|>", "an end serves as padding"
