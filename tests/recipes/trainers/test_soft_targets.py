"""What a configuration may ask of soft targets, and that each label of a batch finds its own place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from datasets import Dataset as HfDataset
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from trl import SFTConfig

from reasonrec.data_gen.schema import Dataset
from reasonrec.data_gen.tasks.choice import TaskChoice
from reasonrec.recipes.models.checkpoint import Setting
from reasonrec.recipes.policies.base import TEACHER_ROWS, Policy, build_policy
from reasonrec.recipes.policies.loading import load_fresh
from reasonrec.recipes.trainers.item_sft import ItemSFTTrainer
from reasonrec.recipes.trainers.soft_targets import TABLE, SoftTargets, Taught
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.index import ItemIndex
from reasonrec.tokenizers.output import resume_folder, start_folder

COMPANY = {"teacher": "co_visitation", "top_k": 8}


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"alpha": 0.5}, ["names no teacher", "co_visitation, sasrec, popularity, uniform"]),
        ({"teacher": "covisitation"}, ["'covisitation' is unknown", "did you mean 'co_visitation'"]),
        ({"teacher": "popularity", "alfa": 0.1}, ["no option 'alfa'", "did you mean 'alpha'"]),
        ({"teacher": "popularity", "window": 5}, ["no option 'window'", "alpha, teacher, top_k"]),
        ({"teacher": "co_visitation", "windw": 5}, ["did you mean 'window'"]),
        ({**COMPANY, "alpha": 1.01}, ["soft_targets[alpha]=1.01", "from 0 to 1"]),
        ({**COMPANY, "alpha": -0.5}, ["soft_targets[alpha]=-0.5", "from 0 to 1"]),
        ({**COMPANY, "alpha": True}, ["soft_targets[alpha]=True"]),
        ({**COMPANY, "alpha": "half"}, ["soft_targets[alpha]='half'"]),
        ({**COMPANY, "top_k": 0}, ["soft_targets[top_k]=0"]),
        ({"teacher": "sasrec", "folds": 1}, ["soft_targets[folds]=1"]),
        ({"teacher": ["sasrec"]}, ["is unknown"]),
    ],
)
def test_mistakes_are_named(asked: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        SoftTargets.parse(asked, "semantic_id")
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_what_is_asked_for() -> None:
    assert SoftTargets.parse(None, "dual_head") is None
    assert SoftTargets.parse({}, "semantic_id") is None
    assert SoftTargets.parse({**COMPANY, "alpha": 0}, "semantic_id") is None
    found = SoftTargets.parse({"teacher": "co_visitation", "window": 4}, "semantic_id")
    assert found is not None
    assert (found.alpha, found.top_k, found.options.window, found.options.last) == (0.5, 50, 4, 10)
    for policy in ("dual_head", "parallel_codes"):
        message = f"policy={policy} has none: leave them out, or choose one of semantic_id$"
        with pytest.raises(UserError, match=message):
            SoftTargets.parse(COMPANY, policy)


@pytest.fixture(scope="module")
def dataset(tiny_dataset: Path) -> Dataset:
    return Dataset.load(tiny_dataset)


@pytest.fixture(scope="module")
def policy(dataset: Dataset, tiny_index: Path, tiny_base: Path) -> Policy:
    setting = Setting(str(tiny_base), "lora", "History:{history}", chat=False, system=None, max_history=5)
    return build_policy(dataset.catalogue(ItemIndex.load(tiny_index)), setting)


Prepare = Callable[..., tuple[Taught, pl.DataFrame]]


@pytest.fixture
def prepared(dataset: Dataset, policy: Policy, tmp_path: Path) -> Prepare:
    """What a stage does before it trains."""

    def prepare(asked: dict[str, Any] = COMPANY, tasks: dict[str, float] | None = None, **options: Any) -> Any:
        choice = TaskChoice(tasks=tasks or {"seqrec": 1.0}, max_history=5, one_per_prefix=options.get("each", False))
        examples = policy.examples(
            dataset.train, one_per_prefix=choice.one_per_prefix, set_order=options.get("sets", False)
        )
        plan = choice.plan(examples, passes=0.5, batch_size=8, seed=0)
        soft = SoftTargets.parse(asked, "semantic_id")
        assert soft is not None
        work = resume_folder(tmp_path / "out")
        if not work.exists():
            start_folder(work)
        return soft.prepare(dataset, policy, examples, plan, tmp_path / "out", 0), plan

    return prepare


@pytest.mark.parametrize("each", [False, True], ids=["windows", "prefixes"])
@pytest.mark.parametrize("sets", [False, True], ids=["sequences", "sets"])
def test_each_label_is_told_what_its_place_is(
    prepared: Prepare, dataset: Dataset, policy: Policy, each: bool, sets: bool
) -> None:
    """Decode labels item by item: the place's teacher is the one who was asked with what stands before this item."""
    taught, plan = prepared(
        {"teacher": "uniform", "top_k": 48}, {"seqrec": 1, "item2index": 0.5}, each=each, sets=sets
    )
    first, examples = taught.examples.first, taught.examples.examples
    item_of = {tuple(ids): item for item, ids in enumerate(policy.prompts.item_token_ids)}
    rendered = taught.examples(plan.to_dict(as_series=False))
    assert rendered["input_ids"] == examples(plan.to_dict(as_series=False))["input_ids"]
    seen = 0
    for line, labels, rows in zip(plan.iter_rows(named=True), rendered["labels"], rendered[TEACHER_ROWS], strict=True):
        assert len(rows) == len(labels)
        if line["task"]:
            assert set(rows) == {-1}
            continue
        whole = examples.part(line["source"], slice(None), line["shuffle"])
        word: list[int] = []
        shown = range(line["stop"] - 1 if each else line["start"], line["stop"])
        places = iter(shown)
        for label, row in zip(labels, rows, strict=True):
            assert (row == -1) == (label == -100)
            word += [label] if label != -100 else []
            if tuple(word) in item_of:
                place = next(places)
                assert item_of[tuple(word)] == whole[place]
                assert row == first[line["source"], line["shuffle"]] + place
                # 48 items of 48: all but those before it, where a history is masked
                left = set(taught.score.items[row][taught.score.shares[row] > 0].tolist())
                barred = set(whole[:place].tolist()) if dataset.facts["mask_history"] else set()
                assert left == set(range(48)) - barred
                word, seen = [], seen + 1
        assert not word
        assert next(places, None) is None
    assert seen > 100


def test_the_table_is_read_again_and_belongs_to_one_dataset(
    prepared: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught, _ = prepared()
    path = resume_folder(tmp_path / "out") / TABLE
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("reasonrec.recipes.trainers.soft_targets._table", None)  # nobody is asked again
        again, _ = prepared()
    assert torch.equal(again.score.items, taught.score.items)
    assert path.read_bytes() == before
    with pytest.raises(UserError, match=r"soft_targets.safetensors holds soft targets of asked .*: remove it"):
        prepared({"teacher": "popularity"})
    with safe_open(path, framework="np") as stored:
        about = stored.metadata()["about"]
    other = about.replace(about.split('"')[3], "0" * 64)
    save_file(load_file(path), path, metadata={"about": other})
    with pytest.raises(UserError, match=r"soft_targets.safetensors holds soft targets of dataset '0000.*: remove it"):
        prepared()


def test_a_plan_without_histories_is_refused(prepared: Prepare) -> None:
    with pytest.raises(UserError, match="soft_targets: the plan of 124 examples has none of seqrec"):
        prepared(tasks={"item2index": 1.0})


@pytest.fixture
def trainer(policy: Policy, prepared: Prepare, tmp_path: Path) -> Callable[..., ItemSFTTrainer]:
    """Builds what the stage builds: SGD, so that a step is the gradient."""

    def make(asked: dict[str, Any] | None, base: str) -> ItemSFTTrainer:
        from reasonrec.recipes.models.load import LoraSettings, add_adapter
        from reasonrec.recipes.models.precision import choose

        taught, plan = prepared(asked or COMPANY)
        torch.manual_seed(0)
        setting = Setting(base, "lora", "History:{history}", chat=False, system=None, max_history=5)
        model, _ = load_fresh(setting, policy, choose("fp32", "cpu"))
        model = add_adapter(model, policy.new_tokens, LoraSettings(2, 4, 0.0, "all-linear"))
        settings = {
            "per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 0.1, "bf16": False, "use_cpu": True,
            "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no", "logging_steps": 1,
            "disable_tqdm": True, "remove_unused_columns": False, "optim": "sgd",
            "dataset_kwargs": {"skip_prepare_dataset": True},
        }  # fmt: skip
        soft = taught if asked else None
        examples = taught.examples if asked else taught.examples.examples
        valid = taught.examples.examples(plan.head(4).to_dict(as_series=False))
        return ItemSFTTrainer(
            policy=policy,
            taught=soft,
            model=model,
            args=SFTConfig(output_dir=str(tmp_path / "run"), **settings),
            train_dataset=HfDataset(plan.to_arrow()).with_transform(examples),
            eval_dataset=HfDataset.from_dict(valid),
            processing_class=policy.tokenizer,
        )

    return make


def test_rows_reach_the_loss_through_trl(trainer: Callable[..., ItemSFTTrainer], tiny_base: Path) -> None:
    """What it relies on in TRL: its collator pads on the right, and what it hands the trainer reaches the model."""
    soft = trainer({**COMPANY, "alpha": 0.7}, str(tiny_base))
    batch = next(iter(soft.get_train_dataloader()))
    assert batch[TEACHER_ROWS].shape == batch["labels"].shape
    assert ((batch[TEACHER_ROWS] >= 0) == (batch["labels"] != -100)).all()
    one = soft.train_dataset[0]
    assert batch[TEACHER_ROWS][0, : len(one[TEACHER_ROWS])].tolist() == one[TEACHER_ROWS]
    assert (batch[TEACHER_ROWS][0, len(one[TEACHER_ROWS]) :] == -1).all()
    plain = soft.model(**{name: value for name, value in batch.items() if name != TEACHER_ROWS}, fused_lm_head=True)
    loss = soft.compute_loss(soft.model, dict(batch))
    assert abs(float(loss.detach()) - float(plain.loss.detach())) > 0.01
    valid = next(iter(soft.get_eval_dataloader()))
    assert TEACHER_ROWS not in valid, "the validation loss is of what came"
    before = {name: p.detach().clone() for name, p in soft.model.named_parameters() if p.requires_grad}
    soft.train()
    moved = {name for name, p in soft.model.named_parameters() if name in before and not torch.equal(p, before[name])}
    assert moved == set(before)


def test_training_on_a_teacher_alone_moves_the_policy_to_it(
    trainer: Callable[..., ItemSFTTrainer], tiny_base: Path
) -> None:
    """alpha 1: the loss of a step falls towards the teacher's entropy, whatever came."""
    soft = trainer({"teacher": "popularity", "alpha": 1, "top_k": 3}, str(tiny_base))
    batch = next(iter(soft.get_train_dataloader()))
    optimizer = torch.optim.Adam([p for p in soft.model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(12):
        loss = soft.compute_loss(soft.model, dict(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert np.isfinite(losses).all()
