"""Say what this machine can train: versions, devices, and whether a configuration fits and how long it takes.

accelerate launch recipes/doctor.py
accelerate launch recipes/doctor.py --training recipes/configs/demo/sft.yaml
accelerate launch recipes/doctor.py --model runs/demo/sft

With `--training` it counts the memory of that configuration term by term, then tries three real steps on its longest
examples. With `--model` it draws items for validation cases: whether reinforcement learning will find something to
reward.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from reasonrec.recipes.args import parse, run
from reasonrec.recipes.keys import TRUST_HELP
from reasonrec.tokenizers.environment import is_first_process
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.terminal import one_line, say

# A training that leaves nothing behind and looks at nothing else.
BARE = ["--valid_rows", "0", "--eval_strategy", "no", "--save_strategy", "no", "--report_to", "none"]


@dataclass
class DoctorConfig:
    """Configuration of a check."""

    training: str | None = field(
        default=None, metadata={"help": "configuration of sft.py to try (YAML)", "path": True}
    )
    model: str | None = field(
        default=None, metadata={"help": "folder of a trained model that grpo.py is to start from", "path": True}
    )
    dataset: str | None = field(default=None, metadata={"help": "the model's dataset, if it moved", "path": True})
    prompts: int = field(default=64, metadata={"help": "validation cases for the model", "at_least": 1})
    rollouts: int = field(default=16, metadata={"help": "items drawn for each of them", "at_least": 2})
    trust_remote_code: bool = field(default=False, metadata={"help": TRUST_HELP})


def try_training(path: str) -> None:
    """Count the memory of a training, try it, and say what to change where it does not fit.

    Raises:
        UserError: If the configuration is wrong.
    """
    from reasonrec.recipes.sft import SftStage
    from reasonrec.recipes.sizing.training import advice, load_of, shape_of, table
    from reasonrec.recipes.trainers.item_sft import SftArguments
    from reasonrec.recipes.trainers.keys import inherited
    from reasonrec.recipes.trainers.trial import Trial

    stage, given = parse([SftStage, inherited("sft")], ["--config", path])
    with TemporaryDirectory() as scratch:
        found = Path(scratch) / "trial.json"
        words = ["--config", path, "--trial", str(found), "--output_dir", str(Path(scratch) / "out")]
        words += BARE
        say("\ntrying three steps …")
        command = [sys.executable, str(Path(__file__).with_name("sft.py")), *words]
        child = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
        if child.returncode == 2:
            raise UserError(one_line(child.stderr.strip().splitlines()[-1].removeprefix("error: "), 2000))
        tried = Trial(**json.loads(found.read_text(encoding="utf-8"))) if found.is_file() else None
    args = SftArguments(**given | {"output_dir": "none", "report_to": "none"})
    shape, load = shape_of(stage, args), load_of(stage, args, tried.longest if tried else 512)
    say(table(shape, load, args.chosen, None if tried is None else tried.peak))
    if tried is None:
        last = (child.stderr.strip().splitlines() or ["the kernel ended it, as it does when memory is out"])[-1]
        say(f"the trial ended with status {child.returncode}: {one_line(last)}")
    else:
        say(tried)
    for line in advice(shape, load, args.chosen):
        say(line)


def main() -> None:
    """Parse, look, say."""
    (config,) = parse([DoctorConfig])

    # PyTorch and what is built on it take seconds to import; by now it is known that they are needed.
    from reasonrec.recipes.sizing.machine import devices, versions

    if not is_first_process():
        return
    for line in (*versions(), *devices()):
        say(line)
    if config.training is not None:
        try_training(config.training)
    if config.model is not None:
        from reasonrec.recipes.sizing.rollouts import try_rollouts

        say(try_rollouts(config.model, config.dataset, config.prompts, config.rollouts, config.trust_remote_code))


if __name__ == "__main__":
    run(main)()
