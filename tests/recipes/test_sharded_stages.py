"""Training stages on weights that two processes share out: the folders that one process writes.

Two CPU processes read `configs/accelerate/fsdp2.yaml` as a launch does. Accelerate turns FSDP on for accelerators only
(on CPUs a launch would be DDP in silence), so the worker turns it on by itself; all that follows is accelerate's.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file

from reasonrec.data_gen.schema import Dataset
from reasonrec.recipes import grpo, sft

ROOT = Path(__file__).parents[2]

WORKER = '''
"""Run stages one after the other, each with its flags, on shards."""
import importlib, json, os, sys
from pathlib import Path
from accelerate import PartialState, state
from accelerate.utils import DistributedType

build = state.AcceleratorState.__init__


def build_sharded(self, *args, fsdp_plugin=None, **kwargs):
    build(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


state.AcceleratorState.__init__ = build_sharded

from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from reasonrec.recipes.trainers import watched


class Sharded(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == int(os.environ.get("DIES_AT", 0)):
            os._exit(9)

    def on_train_end(self, args, state, control, model, **kwargs):
        whole = [n for n, p in model.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]
        assert not whole, whole


trained = watched.WatchedTrainer.__init__


def watch(self, *args, **kwargs):
    trained(self, *args, **kwargs)
    self.add_callback(Sharded())


watched.WatchedTrainer.__init__ = watch
for name, flags in json.loads(Path(sys.argv[1]).read_text()):
    stage = importlib.import_module(f"reasonrec.recipes.{name}")
    sys.argv[1:] = flags
    stage.run(stage.main)()
'''


def launched(configuration: Path) -> dict[str, str]:
    """What a launch with an accelerate configuration puts into the environment."""
    args = launch_command_parser().parse_args(["--config_file", str(configuration), "stage.py"])
    args, _, _ = _validate_launch_command(args)
    return prepare_multi_gpu_env(args)


Sharded = Callable[..., str]


@pytest.fixture(scope="module")
def sharded(torchrun: Callable[..., subprocess.CompletedProcess[str]]) -> Sharded:
    """A function that runs stages on shards, to their end or to an update; returns what they printed."""

    def launch(folder: Path, *stages: tuple[str, list[str]], processes: int = 2, dies_at: int = 0) -> str:
        (folder / "worker.py").write_text(WORKER)
        (folder / "stages.json").write_text(json.dumps(stages))
        environment = launched(ROOT / "recipes/configs/accelerate/fsdp2.yaml")
        done = torchrun(
            folder / "worker.py", folder / "stages.json", processes=processes, check=not dies_at,
            **(environment | {"ACCELERATE_USE_CPU": "1", "DIES_AT": str(dies_at)}),
        )  # fmt: skip
        assert (done.returncode != 0) == (dies_at > 0)
        return done.stdout

    return launch


SIZE = "--per_device_train_batch_size"
METHODS = ("full", "lora", "qlora")
COMMON = [
    *("--bf16", "false", "--lr_scheduler_type", "constant", "--save_steps", "2", "--report_to", "none"),
    *("--activation_checkpointing", "false", "--logging_steps", "1", "--disable_tqdm", "true"),
]
SGD = [*COMMON, "--optim", "sgd"]
GRPO = [
    *("--rewards", "{rsvr: 1.0, exact: 0}", "--num_generations", "4", "--max_steps", "3", "--learning_rate", "0.1"),
    *("--beta", "0.01", "--rollout_budget", "2", "--valid_rows", "7", "--eval_steps", "2"),
]


@pytest.fixture(scope="module")
def flags(sft_flags: list[str]) -> list[str]:
    """A short training of whole batches: a rest would be padded by repeats."""
    sequences = Dataset.load(sft_flags[1]).train["items"].to_list()
    part = 48 / (2 * sum(len(items) - 1 for items in sequences))
    tasks = ["--tasks", "{seqrec: 1, index2item: 1}", "--one_per_prefix", "true", "--max_history", "6"]
    return [*sft_flags, *tasks, "--num_train_epochs", str(part)]


@pytest.fixture(scope="module")
def two(flags: list[str], sharded: Sharded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Supervised trainings by all methods, and a reinforced one, in two processes."""
    folder = tmp_path_factory.mktemp("two")
    made = [
        ("sft", [*flags, *SGD, *sft_options(method), SIZE, "4", "--output_dir", str(folder / method)])
        for method in METHODS
    ]
    reinforced = ["--model", str(folder / "lora"), *SGD, *GRPO, SIZE, "8", "--output_dir", str(folder / "grpo")]
    sharded(folder, *made, ("grpo", reinforced))
    return folder


def sft_options(method: str) -> list[str]:
    return ["--method", method, "--learning_rate", "0.3"]


def alone(monkeypatch: pytest.MonkeyPatch, stage: ModuleType, *flags: str) -> None:
    """Run a stage in this process."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")  # so that it is put back
    monkeypatch.setattr(sys, "argv", [str(stage.__file__), *flags])
    stage.run(stage.main)()


def losses(folder: Path) -> list[float]:
    log = json.loads((folder / "train_metrics.json").read_text())["log"]
    return [entry["loss"] for entry in log if "loss" in entry]


def assert_close(ours: Path, theirs: Path, atol: float) -> None:
    one, two = (load_file(next(folder.glob("*model.safetensors"))) for folder in (theirs, ours))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=atol)


@pytest.mark.parametrize("method", METHODS)
def test_sft_learns_what_one_process_learns(
    two: Path, flags: list[str], method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = tmp_path / "one"
    alone(monkeypatch, sft, *flags, *SGD, *sft_options(method), SIZE, "8", "--output_dir", str(one))
    assert len(losses(one)) == 6
    assert losses(two / method) == pytest.approx(losses(one), rel=1e-4)
    assert_close(two / method, one, atol=1e-5)


def test_other_policies_learn_what_they_learn_on_whole_weights(
    sft_flags: list[str], set_index: Path, sharded: Sharded, stage_on_two: Callable[..., object], tmp_path: Path
) -> None:
    """A table of item vectors, and codes in drawn orders with a category head.

    Beside two processes without shards: which items of the table are read anew depends on a process' own batch.
    """
    data, base = sft_flags[:2], sft_flags[4:6]
    common = [*SGD, "--method", "lora", "--learning_rate", "0.03", "--max_history", "6", "--num_train_epochs", "0.4"]
    common += ["--tasks", "{seqrec: 1}", SIZE, "4"]
    asked = {
        "dual_head": [*data, *base, *common, "--policy", "dual_head"],
        "parallel_codes": [*data, *base, *common, "--policy", "parallel_codes", "--index", str(set_index)],
    }
    sharded(tmp_path, *(("sft", [*own, "--output_dir", str(tmp_path / name)]) for name, own in asked.items()))
    for name, own in asked.items():
        whole = tmp_path / f"{name}_whole"
        stage_on_two("sft", *own, "--output_dir", whole)
        assert len(losses(whole)) > 1
        assert losses(tmp_path / name) == pytest.approx(losses(whole), rel=1e-4)
        assert_close(tmp_path / name, whole, atol=1e-5)


def test_grpo_rolls_out_on_whole_weights(two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven cases are ranked by two processes, each with its own number of searches: nobody waits for another."""
    one = tmp_path / "one"
    alone(monkeypatch, grpo, "--model", str(two / "lora"), *SGD, *GRPO, SIZE, "16", "--output_dir", str(one))
    assert losses(two / "grpo") == pytest.approx(losses(one), rel=1e-3, abs=1e-6)
    assert_close(two / "grpo", one, atol=1e-5)


def test_another_number_of_processes_goes_on_from_a_checkpoint(
    flags: list[str], sharded: Sharded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AdamW: without its moments the first update would be a whole learning rate in every weight."""
    flags = [*flags, *COMMON, "--method", "lora", "--learning_rate", "1e-2"]
    alone(monkeypatch, sft, *flags, SIZE, "8", "--output_dir", str(tmp_path / "one"))
    two = ["--output_dir", str(tmp_path / "two")]
    sharded(tmp_path, ("sft", [*flags, SIZE, "4", *two]), dies_at=5)
    printed = sharded(tmp_path, ("sft", [*flags, SIZE, "8", *two]), processes=1)
    assert "going on from" in printed
    assert "checkpoint-4" in printed
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
    assert_close(tmp_path / "two", tmp_path / "one", atol=2e-3)
