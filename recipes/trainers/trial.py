"""A training tried out: a few real steps on its longest examples, which say whether it fits and how long it takes."""

from __future__ import annotations

import math
import resource
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback

MOST_EXAMPLES = 20_000  # that are looked at for their length


@dataclass(frozen=True)
class Trial:
    """What a few steps took.

    Attributes:
        seconds: One step on the longest examples.
        peak: Most memory in bytes: of the device, or of the process where that is the CPU.
        longest: Tokens of the longest example.
        share: Tokens of an average batch, its padding included, over those of one of the longest examples only.
        steps: Steps of the whole training.
    """

    seconds: float
    peak: int
    longest: int
    share: float
    steps: int

    @property
    def total(self) -> float:
        """Seconds of the whole training, if a step's time is proportional to its tokens."""
        return self.seconds * self.share * self.steps

    def __str__(self) -> str:
        return (
            f"tried: {self.seconds:.2f} s for a step of the longest examples ({self.longest} tokens), "
            f"{self.peak / 2**30:.2f} GiB at most; an average step has {self.share:.0%} of their tokens, so "
            f"{self.steps} steps take about {self.total / 60:.0f} minutes"
        )


class _Clock(TrainerCallback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def trial(trainer: Any, steps: int = 3) -> Trial:
    """Train a few steps on the longest examples of a trainer, which is of no use afterwards.

    Args:
        trainer: A trainer with its whole training in `train_dataset`, in the order of the steps.
        steps: How many to try, besides one to warm up.
    """
    args, data = trainer.args, trainer.train_dataset
    batch = args.per_device_train_batch_size * max(1, args.world_size)
    # Whole batches, evenly spaced: examples of one batch are about equally long.
    batches = math.ceil(len(data) / batch)
    chosen = range(0, batches, max(1, math.ceil(batches * batch / MOST_EXAMPLES)))
    lengths = [[len(data[i]["input_ids"]) for i in range(b * batch, min((b + 1) * batch, len(data)))] for b in chosen]
    tokens = [max(part) * len(part) for part in lengths]
    at, longest = max(
        ((chosen[n] * batch + part.index(max(part)), max(part)) for n, part in enumerate(lengths)),
        key=lambda found: found[1],
    )
    per_step = args.gradient_accumulation_steps
    clock = _Clock()
    trainer.add_callback(clock)
    trainer.train_dataset = data.select([at] * (batch * per_step * (steps + 1)))
    args.max_steps = steps + 1
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    return Trial(
        seconds=(clock.ends[-1] - clock.ends[0]) / steps,
        peak=_peak(),
        longest=longest,
        share=sum(tokens) / len(tokens) / (longest * batch),
        steps=math.ceil(batches / per_step),
    )


def _peak() -> int:
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, KiB elsewhere
    return most if sys.platform == "darwin" else most * 1024
