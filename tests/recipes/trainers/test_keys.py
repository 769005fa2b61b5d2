"""The table of inherited keys against the installed TRL, and what is refused."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
from trl import GRPOConfig, SFTConfig

from reasonrec.recipes.args import build, parse
from reasonrec.recipes.trainers import keys
from reasonrec.recipes.trainers.grpo_arguments import GrpoArguments
from reasonrec.recipes.trainers.item_sft import SftArguments
from reasonrec.recipes.trainers.keys import ALIASES, REFUSED, TABLE, Stage, dump, inherited, make_table
from reasonrec.tokenizers.errors import UserError

CONFIGS = {"sft": SFTConfig, "grpo": GRPOConfig}
ARGUMENTS = {"sft": SftArguments, "grpo": GrpoArguments}
both = pytest.mark.parametrize("stage", ["sft", "grpo"])


def given(stage: Stage, *argv: str) -> dict[str, object]:
    (values,) = parse([inherited(stage)], ["--output_dir", "out", *argv])
    return values


def test_the_table_is_that_of_the_installed_version() -> None:
    """If not: python -m reasonrec.recipes.trainers.keys."""
    assert TABLE.read_text(encoding="utf-8") == dump(make_table())


@both
def test_every_inherited_key_works_or_is_refused(stage: Stage) -> None:
    """A key that a new version brings is neither, until somebody has looked who reads it."""
    theirs = {field.name for field in fields(CONFIGS[stage])} | {"precision"}  # ours
    works = {key.name for key in inherited(stage).keys}
    aliases = {name for name in ALIASES.values() if name in theirs}
    assert not works & REFUSED[stage].keys()
    assert theirs - works - REFUSED[stage].keys() - aliases == set()
    assert works <= theirs
    # The first part of the table holds for both stages, so it may name what only the other one inherits.
    assert {name for name in REFUSED[stage] if name not in theirs} <= {field.name for field in fields(SFTConfig)}


def test_a_key_that_nobody_has_looked_at_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = json.loads(TABLE.read_text(encoding="utf-8"))
    del old["both"]["weight_decay"]
    (tmp_path / "keys.json").write_text(json.dumps(old))
    monkeypatch.setattr(keys, "TABLE", tmp_path / "keys.json")
    with pytest.raises(UserError, match="neither known to work nor refused: weight_decay; add each to REFUSED, or to"):
        make_table()
    assert "weight_decay" in make_table(["weight_decay"])["both"]


@both
def test_every_refused_key_is_refused_with_what_to_do(stage: Stage, tmp_path: Path) -> None:
    path = tmp_path / "stage.yaml"
    for name, instead in REFUSED[stage].items():
        for argv in ([f"--{name}", "1"], [f"--{name}"], [f"--no_{name}"], [f"--{name.replace('_', '-')}=1"]):
            with pytest.raises(UserError) as caught:
                given(stage, *argv)
            assert str(caught.value) == f"{argv[0].split('=')[0]} is not supported here: {instead}"
        path.write_text(f"{name}: null\n")
        with pytest.raises(UserError, match=rf"stage\.yaml: {name} is not supported here: "):
            given(stage, "--config", str(path))


@both
def test_what_is_said_instead_names_keys_that_are_there(stage: Stage) -> None:
    assert not [name for name, instead in REFUSED[stage].items() if not instead or instead.endswith(".")]


def test_arguments_made_in_python_are_refused_too(tmp_path: Path) -> None:
    for cls, name, value in (
        (SftArguments, "max_length", 8), (SftArguments, "packing", True), (SftArguments, "pad_token", "x"),
        (GrpoArguments, "max_completion_length", 1), (GrpoArguments, "generation_batch_size", 64),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"^{name}={value} is not supported here: "):
            cls(output_dir=str(tmp_path), bf16=False, **{name: value})


@both
def test_the_arguments_can_be_made_of_what_was_given(stage: Stage, tmp_path: Path) -> None:
    flags = ["--learning_rate", "1e-3", "--seed", "3", "--optim", "adafactor", "--bf16", "false"]
    values = given(stage, *flags, "--lr_scheduler_kwargs", "{a: 1}")
    assert values == {
        "output_dir": "out", "learning_rate": 1e-3, "seed": 3, "optim": "adafactor", "bf16": False,
        "lr_scheduler_kwargs": {"a": 1},
    }  # fmt: skip
    args = build(ARGUMENTS[stage], values)
    assert (args.learning_rate, args.seed, args.optim.value) == (1e-3, 3, "adafactor")


@both
@pytest.mark.parametrize(
    "argv",
    [
        ["--activation_checkpointing", "false"], ["--gradient_checkpointing", "false"],
        ["--no_gradient_checkpointing"], ["--gradient-checkpointing=false"],
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("error::FutureWarning")
def test_the_old_name_is_understood_and_nothing_is_deprecated(stage: Stage, argv: list[str]) -> None:
    args = build(ARGUMENTS[stage], given(stage, *argv, "--bf16", "false"))
    assert not args.activation_checkpointing
    assert not args.gradient_checkpointing
    assert build(ARGUMENTS[stage], given(stage, "--bf16", "false")).activation_checkpointing, "TRL's default"


def test_both_names_in_one_file(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("activation_checkpointing: true\ngradient_checkpointing: false\n")
    with pytest.raises(UserError, match="activation_checkpointing is given twice, once as gradient_checkpointing"):
        given("sft", "--config", str(tmp_path / "c.yaml"))


@both
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--report_to", "wandb"], r"report_to=wandb: not installed \(pip install wandb\); choose from .*none"),
        (["--report_to", "wnadb"], r"report_to=wnadb: not installed \(there is no such integration\); choose from"),
        (["--lr_scheduler_type", "cosin"], "cosin is not a valid SchedulerType"),
    ],
)
def test_what_is_not_there_is_said_before_anything_is_loaded(stage: Stage, argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build(ARGUMENTS[stage], given(stage, *argv, "--bf16", "false"))
    assert "\n" not in str(caught.value)


@both
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num_train_epochs", "0"], "num_train_epochs=0.0 has to be above 0"),
        (["--per_device_train_batch_size", "0"], "per_device_train_batch_size=0 has to be at least 1"),
        (["--learning_rate", "nan"], "learning_rate=nan has to be a finite number"),
        (["--seed", "-1"], "seed=-1 has to be at least 0"),
    ],
)
def test_numbers_out_of_range(stage: Stage, argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        given(stage, *argv)


def test_yaml_reads_no_as_false(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("save_strategy: no\n")
    assert given("sft", "--config", str(tmp_path / "c.yaml"))["save_strategy"] == "no"
