"""Numbers that end a training, and reports over a whole run: on a model of three weights, with the real trainer."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState
from trl import GRPOTrainer, SFTTrainer

from reasonrec.recipes.trainers.divergence import SKIPPED_IN_A_ROW
from reasonrec.recipes.trainers.item_grpo import ItemGRPOTrainer
from reasonrec.recipes.trainers.item_sft import ItemSFTTrainer
from reasonrec.recipes.trainers.watched import WatchedTrainer
from reasonrec.tokenizers.errors import UserError

STEPS = 8


class Line(nn.Module):
    """A regression; `factor` is what a row's loss is multiplied by."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, -0.5, 0.25]))

    def forward(self, x: torch.Tensor, factor: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": ((x @ self.weight - 1.0).square() * factor).mean()}


def make(
    out: Path, factors: dict[int, float] | None = None, cls: type[Trainer] = WatchedTrainer, **options: Any
) -> Any:
    """A trainer whose row `i` weighs `factors[i]`, 1 by default; one row a step."""
    generator = torch.Generator().manual_seed(0)
    rows = [
        {"x": torch.randn(3, generator=generator), "factor": torch.tensor((factors or {}).get(i, 1.0))}
        for i in range(STEPS)
    ]
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 1, "num_train_epochs": 1, "learning_rate": 0.01, "optim": "sgd",
        "lr_scheduler_type": "constant", "logging_steps": 3, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "use_cpu": True, "remove_unused_columns": False,
        "train_sampling_strategy": "sequential",
    }  # fmt: skip
    return cls(model=Line(), args=TrainingArguments(str(out), **(settings | options)), train_dataset=rows)


# --- what ends a training ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "shown"), [(float("nan"), "nan"), (float("inf"), "inf")])
def test_a_loss_that_is_not_finite_ends_it_at_its_step(tmp_path, value, shown):
    trainer = make(tmp_path, {4: value}, save_strategy="steps", save_steps=1)
    with pytest.raises(
        UserError, match=rf"training diverged at step 5: the loss is {shown}; lower learning_rate=0.01,"
    ):
        trainer.train()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"checkpoint-{step}" for step in range(1, 5)]


def test_transformers_alone_hides_it(tmp_path):
    """The reason for the check; if this fails, the library has mended it."""
    trainer = make(tmp_path, {4: float("nan")}, cls=Trainer)
    trainer.train()
    assert trainer.model.weight.isnan().all()
    assert all(line["loss"] > 0 for line in trainer.state.log_history if "loss" in line)


def test_a_gradient_that_is_not_finite_ends_it(tmp_path):
    trainer = make(tmp_path)
    trainer.model.weight.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(UserError, match=r"at step 1: the gradient norm is (inf|nan); .*max_grad_norm=1"):
        trainer.train()


def test_every_batch_of_a_step_counts(tmp_path):
    trainer = make(tmp_path, {2: float("nan")}, gradient_accumulation_steps=4)
    with pytest.raises(UserError, match="at step 1: the loss is nan"):
        trainer.train()


def test_weights_that_are_not_finite_reach_no_checkpoint(tmp_path):
    """Loss and gradient of a step are finite, what the step makes of the weights is not."""
    trainer = make(tmp_path, learning_rate=1e38, max_grad_norm=0.0, save_strategy="steps", save_steps=1)
    with pytest.raises(UserError, match=r"at step 1: the weights weight hold .*; lower learning_rate=1e\+38"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*/trainer_state.json"))


def test_the_last_step_is_looked_at_without_checkpoints(tmp_path):
    trainer = make(tmp_path, learning_rate=1e38, max_grad_norm=0.0, max_steps=1)
    with pytest.raises(UserError, match="at step 1: the weights weight hold"):
        trainer.train()


def test_a_step_that_the_optimiser_cannot_take_ends_it(tmp_path):
    trainer = make(tmp_path, learning_rate=1e38, optim="adamw_torch")
    with pytest.raises(UserError, match="at step 1: the optimiser's step is too large for float32; lower learning_ra"):
        trainer.train()


# --- steps that loss scaling skips ------------------------------------------------------------------------------


@pytest.fixture
def fp16(monkeypatch):
    """Lets a trainer compute in fp16 with loss scaling, as on a GPU; accelerate itself refuses to on a CPU."""

    def scaled(trainer: Any, **options: float) -> torch.amp.GradScaler:
        monkeypatch.setattr(trainer.accelerator.state, "_mixed_precision", "fp16")
        trainer.accelerator.native_amp = True
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", **options)
        return trainer.accelerator.scaler

    return scaled


def test_skipped_steps_are_no_divergence(tmp_path, fp16):
    trainer = make(tmp_path)
    scaler = fp16(trainer, init_scale=3e38, backoff_factor=1e-20)
    trainer.train()
    assert scaler.get_scale() < 1e20, "a step was skipped"
    assert trainer.state.global_step == STEPS
    assert trainer.model.weight.isfinite().all()
    assert trainer.state.log_history[-1]["train_loss"] > 0


def test_twenty_in_a_row_are(tmp_path, fp16):
    trainer = make(tmp_path, num_train_epochs=3)
    fp16(trainer, init_scale=3e38, backoff_factor=0.999)
    what = rf"at step {SKIPPED_IN_A_ROW}: loss scaling skipped {SKIPPED_IN_A_ROW} steps in a row.*precision=fp32"
    with pytest.raises(UserError, match=what):
        trainer.train()


def test_accelerate_says_what_was_skipped():
    weight = nn.Parameter(torch.ones(1))
    scaler = torch.amp.GradScaler("cpu")
    optimizer = AcceleratedOptimizer(torch.optim.SGD([weight], lr=0.1), scaler=scaler)
    for factor, skipped in ((1e38, True), (1.0, False)):
        optimizer.zero_grad()
        scaler.scale((weight * factor).sum()).backward()
        optimizer.step()
        assert optimizer.step_was_skipped == skipped


# --- reports over a whole run -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [2, 5, 8])
def test_the_report_of_a_resumed_run_is_that_of_a_whole_one(tmp_path, stop):
    """Killed behind a checkpoint: in between two lines of the log, or when nothing is left to do."""
    options = {"save_strategy": "steps", "save_steps": 1 if stop == 5 else 2, "logging_steps": 3}
    whole = make(tmp_path / "whole", **options)
    expected = whole.train().metrics
    again = make(tmp_path / "again", **options)
    found = again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}")).metrics
    logs = [
        [
            {name: value for name, value in line.items() if name != "train_runtime"}
            for line in trainer.state.log_history
        ]
        for trainer in (whole, again)
    ]
    assert logs[0] == logs[1]
    assert [line["step"] for line in logs[0]] == [3, 6, 8], "three steps, three, and the end"
    assert {**found, "train_runtime": 0} == {**expected, "train_runtime": 0}
    kept = json.loads((tmp_path / "whole" / f"checkpoint-{stop}" / "trainer_state.json").read_text())
    seconds = kept["stateful_callbacks"]["WholeRun"]["attributes"]["seconds"]
    assert found["train_runtime"] > seconds > 0, "those of both parts"


def test_the_loss_is_the_mean_over_all_steps(tmp_path):
    trainer = make(tmp_path)
    alone = make(tmp_path, cls=Trainer)
    assert trainer.train().metrics["train_loss"] == pytest.approx(alone.train().metrics["train_loss"], rel=1e-6)
    assert torch.equal(trainer.model.weight, alone.model.weight)


def test_a_checkpoint_without_a_count_is_gone_on_from(tmp_path):
    """One that another version wrote."""
    make(tmp_path, cls=Trainer, save_strategy="steps", save_steps=4).train()
    trainer = make(tmp_path, save_strategy="steps", save_steps=2)
    metrics = trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4")).metrics
    assert metrics["train_loss"] > 0
    assert trainer.state.global_step == STEPS


# --- what this relies on ----------------------------------------------------------------------------------------


class Passing(Trainer):
    """transformers' own trainer; `seen` is what its loop passes, with the optimiser steps that were done by then."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, eval_dataset=kwargs["train_dataset"])
        self.seen: list[tuple[str, int]] = []
        self.add_callback(Ends(self))

    def note(self, what: str) -> None:
        self.seen.append((what, self.state.global_step))

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.note("training step")
        return super().training_step(*args, **kwargs)

    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        assert isinstance(tr_loss, torch.Tensor)
        assert float(grad_norm) > 0
        self.note("watch")
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.note(next(f"log {name}" for name in ("loss", "eval_runtime", "train_loss") if name in logs))
        if "train_loss" in logs:
            logs["added"] = 1.0
        super().log(logs, start_time)

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        self.note("evaluate")
        return super()._evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.note("save")
        super()._save_checkpoint(*args, **kwargs)


class Ends(TrainerCallback, ExportableState):
    """Notes where a step ends; its state is a number. `began` is how the trainer's own sums begin."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.began: tuple[float, int, int] | None = None

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"steps": self.trainer.state.global_step}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = (float(self.trainer._tr_loss), self.trainer._globalstep_last_logged, state.global_step)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.note("optimizer")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.note("step end")


def test_the_loop_passes_where_it_is_watched(tmp_path):
    every_four = {"save_strategy": "steps", "eval_strategy": "steps"} | dict.fromkeys(
        ("logging_steps", "save_steps", "eval_steps"), 4
    )
    trainer = make(tmp_path, cls=Passing, **every_four)
    result = trainer.train()
    wanted = []
    for step in range(1, STEPS + 1):
        wanted += [("training step", step - 1), ("optimizer", step - 1), ("step end", step), ("watch", step)]
        if step % 4 == 0:
            wanted += [(what, step) for what in ("log loss", "evaluate", "log eval_runtime", "save")]
    wanted += [("watch", STEPS), ("log train_loss", STEPS)]  # once more after the epoch
    assert trainer.seen == wanted
    assert result.metrics["added"] == 1.0, "the dictionary that is logged is the one that is returned"
    trainer.control.should_log = True
    trainer._maybe_log_save_evaluate(torch.tensor(1.0), torch.tensor(1.0), trainer.model, None, 1, None, 0.0)
    assert trainer.seen[len(wanted) :] == [("watch", STEPS)], "no line twice"


@pytest.mark.parametrize("trainer", [SFTTrainer, GRPOTrainer])
def test_trls_trainers_keep_that_loop(trainer):
    for name in ("_inner_training_loop", "_run_epoch", "_maybe_log_save_evaluate", "_finalize_training", "_evaluate"):
        assert getattr(trainer, name) is getattr(Trainer, name)
    assert list(inspect.signature(trainer.log).parameters) == ["self", "logs", "start_time"]


def test_where_a_count_is_kept(tmp_path):
    """transformers writes the state of callbacks into `trainer_state.json`, and starts its own sums anew."""
    make(tmp_path, cls=Passing, save_strategy="steps", save_steps=4).train()
    kept = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["stateful_callbacks"]
    assert kept["Ends"] == {"args": {}, "attributes": {"steps": 4}}
    resumed = make(tmp_path, cls=Passing)
    (ends,) = (callback for callback in resumed.callback_handler.callbacks if isinstance(callback, Ends))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert ends.began == (0.0, 4, 4), "though step 4 was not logged, every third step is"


@pytest.mark.parametrize("cls", [SFTTrainer, GRPOTrainer])
def test_trls_metrics_are_averaged_when_they_are_logged(monkeypatch, cls):
    logged: list[dict[str, float]] = []
    monkeypatch.setattr(Trainer, "log", lambda self, logs, start_time=None: logged.append(dict(logs)))
    trainer = cls.__new__(cls)  # logging takes no more than this
    trainer.model, trainer.log_completions = nn.Linear(1, 1), False
    trainer.accelerator = SimpleNamespace(is_main_process=True)
    trainer._metrics = {"train": {"added": [1.0, 3.0]}, "eval": {}}
    trainer.log({"loss": 0.5})
    assert logged == [{"loss": 0.5, "added": 2.0}]
    assert trainer._metrics == {"train": {}, "eval": {}}


@pytest.mark.parametrize(("ours", "theirs"), [(ItemSFTTrainer, SFTTrainer), (ItemGRPOTrainer, GRPOTrainer)])
def test_both_trainings_are_watched_first(ours, theirs):
    order = ours.__mro__
    assert order.index(ours) < order.index(WatchedTrainer) < order.index(theirs)
    own = {name for name in vars(WatchedTrainer) if not name.startswith("__")}
    assert own & {*dir(Trainer)} == {"train", "training_step", "_maybe_log_save_evaluate", "log"}


# --- several processes ------------------------------------------------------------------------------------------

WORKER = '''
"""One process' numbers are bad; all of them have to stop, at the same step, with the same words."""
import sys
from pathlib import Path
import torch
from accelerate import PartialState
from test_watched import make
from reasonrec.recipes.trainers.divergence import from_all
from reasonrec.tokenizers.errors import UserError

state = PartialState(cpu=True)
said = []
for case in range(3):
    try:
        if case < 2:
            trainer = make(Path(sys.argv[1]), {5: float("nan")} if case == 0 else None)
            if case == 1:
                trainer.model.weight.register_hook(lambda grad: grad * (float("inf") if state.process_index else 1.0))
            trainer.train()
        else:
            def compute():
                if state.process_index:
                    raise UserError("only one fails")
                return 1
            from_all(compute)
    except UserError as error:
        said.append(str(error).split(";")[0])
Path(sys.argv[1], f"said-{state.process_index}").write_text("\\n".join(said))
state.destroy_process_group()  # else gloo's threads may outlive the interpreter that ends, which aborts it
'''


def test_all_processes_stop_together(torchrun, tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    torchrun(tmp_path / "worker.py", tmp_path, PYTHONPATH=str(Path(__file__).parent))
    said = [(tmp_path / f"said-{rank}").read_text().splitlines() for rank in (0, 1)]
    assert said[0] == said[1]
    loss, gradient, mistake = said[0]
    assert loss == "training diverged at step 3: the loss is nan", "rows 4 and 5 are those of step 3"
    assert gradient.startswith("training diverged at step 1: the gradient norm is ")
    assert mistake == "only one fails"
