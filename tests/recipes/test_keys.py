"""The rules of a key's values, how lists are written, and that every stage says which of its keys are paths."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from reasonrec.data_gen.readers.base import READERS as readers
from reasonrec.recipes.args import parse
from reasonrec.recipes.decoding.consistency import Consistency
from reasonrec.recipes.describe import DescribeConfig
from reasonrec.recipes.doctor import DoctorConfig
from reasonrec.recipes.eval_ranking import EvalConfig
from reasonrec.recipes.fuse import FuseConfig
from reasonrec.recipes.grow_catalogue import GrowConfig
from reasonrec.recipes.grpo import GrpoStage
from reasonrec.recipes.index_items import IndexConfig
from reasonrec.recipes.judge_reasoning import JudgeConfig
from reasonrec.recipes.keys import RULES, Key, keys_of
from reasonrec.recipes.models.load import Method
from reasonrec.recipes.prepare import PrepareConfig
from reasonrec.recipes.publish import PublishConfig
from reasonrec.recipes.recommend import RecommendConfig
from reasonrec.recipes.serve import ServeConfig
from reasonrec.recipes.sft import SftStage
from reasonrec.recipes.teachers import SynthesizeConfig
from reasonrec.recipes.trainers.keys import inherited
from reasonrec.tokenizers.errors import UserError

READERS = tuple(readers.entries().values())  # their options are keys of prepare
STAGES = (
    PrepareConfig,
    *READERS,
    DescribeConfig,
    IndexConfig,
    SynthesizeConfig,
    SftStage,
    GrpoStage,
    JudgeConfig,
    FuseConfig,
    EvalConfig,
    Consistency,
    RecommendConfig,
    GrowConfig,
    PublishConfig,
    ServeConfig,
    DoctorConfig,
)


@dataclass
class Config:
    k: int = field(default=10, metadata={"at_least": 1})
    rate: float | None = field(default=None, metadata={"above": 0})
    share: float = field(default=0.0, metadata={"at_least": 0, "below": 1})
    sizes: list[int] = field(default_factory=lambda: [64], metadata={"at_least": 2, "at_most": 99})
    ratios: list[float] | None = None
    tasks: dict[str, float] = field(default_factory=dict, metadata={"at_least": 0})
    models: list[str] = field(default_factory=list, metadata={"path": True})
    output_dir: str = field(default="out", metadata={"path": True})
    rewards: dict[str, Any] = field(default_factory=dict, metadata={"path": True})
    prompt: str = "~/said the sentence"
    logs: str | list[str] = "none"


def config(*argv: str) -> Config:
    (parsed,) = parse([Config], argv)
    assert isinstance(parsed, Config)
    return parsed


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--k", "0"], "k=0 has to be at least 1"), (["--k", "-1"], "k=-1 has to be at least 1"),
        (["--rate", "0"], "rate=0.0 has to be above 0"), (["--rate", "nan"], "rate=nan has to be a finite number"),
        (["--rate=-inf"], "rate=-inf has to be a finite number"), (["--share", "1"], "share=1.0 has to be below 1"),
        (["--sizes", "64", "1"], r"sizes\[1\]=1 has to be at least 2"),
        (["--sizes", "100"], r"sizes\[0\]=100 has to be at most 99"),
        (["--tasks", "{a: 1, b: -0.5}"], r"tasks\[b\]=-0\.5 has to be at least 0"),
        (["--rate", "1e999"], "rate=inf has to be a finite number"),
        (["--k", "1" + 400 * "0"], r"k=10* … 0* has to be a number of 64 bits, 9223372036854775807 at most"),
        (["--k", "9223372036854775808"], r"k=9223372036854775808 has to be a number of 64 bits, \d+ at most"),
        (["--ratios", "0.5", "nan"], r"ratios\[1\]=nan has to be a finite number"),
    ],
)  # fmt: skip
def test_a_number_out_of_range(argv: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^{message}$"):
        config(*argv)


def test_a_number_out_of_range_in_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("rate: .nan\n")
    with pytest.raises(UserError, match="rate=nan has to be a finite number"):
        config("--config", str(tmp_path / "c.yaml"))


@pytest.mark.parametrize("value", ["1e300", "1e9", "2.5", "9" * 5000, "nan", "inf", "\x1b[1m"])
def test_what_is_no_whole_number(value: str) -> None:
    with pytest.raises(UserError, match="argument --k: invalid int value: ") as caught:
        config("--k", value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) <= 3000


@pytest.mark.parametrize("seed", ["-1", "4294967296", "1e300"])
def test_a_seed_that_a_library_would_refuse(seed: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="seed"):
        parse([IndexConfig], ["--dataset", "d", "--output_dir", str(tmp_path / "i"), "--seed", seed])


@pytest.mark.parametrize("text", ["a\0b", "a\udcffb", "\ud83d"])
def test_text_that_no_file_can_hold(text: str) -> None:
    """A byte on the command line that is no UTF-8 is half a character; in a file it is an escape."""
    where = [["--output_dir", text], ["--prompt", text], ["--models", "x", text], ["--rewards", json.dumps({text: 1})]]
    for argv in where:
        with pytest.raises(UserError, match=r"=.*(\\x00|\\ud).* has to be text in UTF-8 without NUL: rename"):
            config(*argv)
    assert config("--prompt", "👩\u200d🚀 é").prompt == "👩\u200d🚀 é"


@pytest.mark.parametrize(
    "words", [["16", "8"], ["16,8"], ["16, 8"], ["16,", "8"], ["[16, 8]"], ["[16,", "8]"], ["[16,8]"]]
)
def test_a_list_of_numbers(words: list[str]) -> None:
    assert config("--sizes", *words).sizes == [16, 8]


@pytest.mark.parametrize("words", [["a", "b"], ["a,b"], ["[a, b]"], ['["a", b]']])
def test_a_list_of_names(words: list[str]) -> None:
    assert config("--models", *words).models == ["a", "b"]
    assert config("--logs", *words).logs == ["a", "b"]


def test_one_name_where_a_list_may_stand() -> None:
    assert config("--models", "a").models == ["a"]
    assert config("--models", "[]").models == []
    assert config("--logs", "a").logs == "a"
    assert config("--ratios", "0.5,1e-1").ratios == [0.5, 0.1]


@pytest.mark.parametrize("words", [["16", "x"], ["[16, x]"], ["[16"], ["{a: 1}"], ["1.5"]])
def test_what_is_no_list(words: list[str]) -> None:
    with pytest.raises(
        UserError, match=r"argument --sizes: '.*' does not fit, expected list\[int\], written as 'a b'"
    ):
        config("--sizes", *words)


def test_a_flag_can_switch_off_what_the_file_sets(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("rate: 0.5\n")
    assert config("--config", str(tmp_path / "c.yaml"), "--rate", "none").rate is None


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the file and on the command line, in lists and in the names of a mapping; free text stays as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text('output_dir: ~/out\nmodels: [~/a, "package:b", ~]\n'.replace(", ~]", ', "~"]'))
    found = config("--config", "~/c.yaml", "--rewards", '{"~/my.py:fn": 1, exact: 0}')
    assert (found.output_dir, found.models) == (f"{tmp_path}/out", [f"{tmp_path}/a", "package:b", str(tmp_path)])
    assert list(found.rewards) == [f"{tmp_path}/my.py:fn", "exact"]
    assert found.prompt == "~/said the sentence"
    assert config("--output_dir=~/x").output_dir == f"{tmp_path}/x"
    assert config("--output_dir", "a~/b~").output_dir == "a~/b~"


def test_a_home_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^output_dir=~nobody-here/x: there is no user 'nobody-here' here; write the"):
        config("--output_dir", "~nobody-here/x")
    monkeypatch.setenv("HOME", "")
    with pytest.raises(UserError, match=r"^output_dir=~/x: HOME is not set; write the whole path$"):
        config("--output_dir", "~/x")


# Keys that hold text and are no paths: names, templates, dates, addresses, ids.
TEXT = {
    "source", "name", "separator", "quote_char", "valid_from", "test_from", "interaction_columns", "item_columns",
    "tasks", "curriculum", "endpoint", "api_key_env", "device", "history_prompt", "system", "lora_target_modules",
    "category", "experts", "without", "soft_targets", "repository", "license", "host", "allowed_hosts",
    "user", "history", "quantizer", "quantizer_options", "compare", "policy", "policy_options",
    "algorithm", "algorithm_options",
    # of TRL and transformers
    "lr_scheduler_type", "lr_scheduler_kwargs", "optim_args", "activation_checkpointing_kwargs",
    "torch_compile_backend", "torch_compile_mode", "liger_kernel_config", "include_num_input_tokens_seen", "log_level",
    "log_level_replica", "report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id",
    "trackio_static_space_id", "metric_for_best_model", "dataloader_multiprocessing_context", "ddp_backend", "debug",
    "pad_to_multiple_of", "loss_type", "scale_rewards",
}  # fmt: skip


def all_keys() -> list[Key]:
    return [key for cls in STAGES for key in keys_of(cls)] + [*inherited("sft").keys, *inherited("grpo").keys]


def test_every_text_is_a_path_or_none() -> None:
    texts = [key for key in all_keys() if any("str" in str(o) or "dict" in str(o) for o in key.options)]
    texts = [key for key in texts if not str(key.annotation).startswith("typing.Literal")]
    assert {key.name for key in texts} > {"output_dir", "model", "rewards", "models"}
    assert not [key.name for key in texts if bool(key.rules.get("path")) == (key.name in TEXT)]
    assert not TEXT - {key.name for key in texts}, "a key that is gone"


def test_every_number_of_a_stage_has_a_bound() -> None:
    keys = [key for cls in STAGES for key in keys_of(cls)]
    numbers = [key for key in keys if any(word in str(key.annotation) for word in ("int", "float"))]
    numbers = [key for key in numbers if not str(key.annotation).startswith("typing.Literal")]
    assert len(numbers) > 30
    assert {key.name for key in numbers if not RULES & set(key.rules)} == {"min_rating"}


def test_a_rule_is_not_misspelt() -> None:
    for cls in STAGES:
        for item in fields(cls):
            assert set(item.metadata) <= {*RULES, "help"}, f"{cls.__name__}.{item.name}"
            assert item.metadata.get("help"), f"{cls.__name__}.{item.name}"


def test_choices_are_those_of_the_modules_that_are_imported_later() -> None:
    assert get_type_hints(SftStage)["method"] == Method


HELP = """
import importlib, sys
module, flag = sys.argv[1:]
sys.argv = ["stage", flag]
try:
    from reasonrec.recipes.args import run
    run(importlib.import_module(module).main)()
except SystemExit as ended:
    heavy = {"torch", "transformers", "trl", "datasets", "accelerate", "sklearn", "matplotlib"} & set(sys.modules)
    print(ended.code, sorted(heavy))
"""


@pytest.mark.parametrize(
    "stage", ["prepare", "describe", "index_items", "synthesize", "sft", "grpo", "eval_ranking", "recommend", "cli"]
)
@pytest.mark.parametrize("flag", ["--help", "--help-all"])
def test_help_waits_for_no_library(stage: str, flag: str, tmp_path: Path) -> None:
    words = [sys.executable, "-c", HELP, f"reasonrec.recipes.{stage}", flag]
    if stage == "cli":
        words = [sys.executable, "-c", HELP.replace('"stage", flag', '"reasonrec", "sft", flag'), *words[3:]]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    *printed, last = done.stdout.splitlines()
    assert last == "0 []", done.stderr
    trl = stage in ("sft", "grpo", "cli")
    assert any("--output_dir" in line or "--model " in line for line in printed)
    assert any("--learning_rate" in line and "rate for" in line for line in printed) == (trl and flag == "--help-all")
