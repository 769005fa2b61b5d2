"""Numbers that end a training, and reports over a whole run: on a model of three weights, with the real trainer."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from transformers import Trainer, TrainingArguments
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


@pytest.mark.parametrize("trainer", [SFTTrainer, GRPOTrainer])
def test_the_loop_passes_where_it_is_watched(trainer):
    loop = inspect.getsource(Trainer._run_epoch)
    assert loop.count("self.training_step(") == 1
    assert loop.count("self._maybe_log_save_evaluate(") == 2, "after each step, and after the epoch"
    assert loop.index("self.optimizer.step()") < loop.index("self.state.global_step += 1")
    assert loop.index("self.callback_handler.on_step_end(") < loop.index("self._maybe_log_save_evaluate(")
    assert "_maybe_log_save_evaluate" not in inspect.getsource(trainer)
    ours = list(inspect.signature(Trainer._maybe_log_save_evaluate).parameters)
    assert ours[:3] == ["self", "tr_loss", "grad_norm"]
    after = inspect.getsource(Trainer._maybe_log_save_evaluate)
    assert after.index("self.log(logs, start_time)") < after.index("self._evaluate(")
    assert after.index("self._evaluate(") < after.index("self._save_checkpoint(")
    assert "self.state.global_step > self._globalstep_last_logged" in after, "no line twice"
    end = inspect.getsource(Trainer._finalize_training)
    assert end.index('metrics["train_loss"] = train_loss') < end.index("self.log(metrics)")
    assert "TrainOutput(self.state.global_step, train_loss, metrics)" in end, "the same dictionary"
    assert list(inspect.signature(trainer.log).parameters) == ["self", "logs", "start_time"]


def test_where_a_count_is_kept():
    """transformers writes the state of callbacks into `trainer_state.json`, and starts its own sums anew."""
    saved = inspect.getsource(Trainer._save_checkpoint)
    assert "cb_state = cb.state()" in saved
    assert saved.index("cb_state = cb.state()") < saved.index("self.state.save_to_json(")
    begin = inspect.getsource(Trainer._inner_training_loop)
    assert begin.index("self._init_training_state(") < begin.index("self._tr_loss = torch.tensor(0.0")
    assert begin.index("self._globalstep_last_logged = self.state.global_step") < begin.index("on_train_begin(")
    for trainer in (SFTTrainer, GRPOTrainer):
        assert "for key, val in self._metrics[mode].items()" in inspect.getsource(trainer.log)


def test_where_tokens_are_counted():
    assert "self._total_train_tokens += " in inspect.getsource(SFTTrainer.compute_loss)
    assert 'self._metrics[mode]["num_tokens"] = [self._total_train_tokens]' in inspect.getsource(SFTTrainer)
    assert "self.state.num_input_tokens_seen += " in inspect.getsource(GRPOTrainer), "in the state, and in checkpoints"


@pytest.mark.parametrize(("ours", "theirs"), [(ItemSFTTrainer, SFTTrainer), (ItemGRPOTrainer, GRPOTrainer)])
def test_both_trainings_are_watched_first(ours, theirs):
    order = ours.__mro__
    assert order.index(ours) < order.index(WatchedTrainer) < order.index(theirs)
    own = {name for name in vars(WatchedTrainer) if not name.startswith("__")}
    assert own & {*dir(Trainer)} == {"train", "training_step", "_maybe_log_save_evaluate", "log"}
    for name in ("_losses", "_skipped", "_whole"):
        assert f"self.{name} " not in inspect.getsource(theirs) + inspect.getsource(Trainer)


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
'''


def test_all_processes_stop_together(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, str(tmp_path / "worker.py"), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    said = [(tmp_path / f"said-{rank}").read_text().splitlines() for rank in (0, 1)]
    assert said[0] == said[1]
    loss, gradient, mistake = said[0]
    assert loss == "training diverged at step 3: the loss is nan", "rows 4 and 5 are those of step 3"
    assert gradient.startswith("training diverged at step 1: the gradient norm is ")
    assert mistake == "only one fails"
