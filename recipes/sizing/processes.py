"""What several GPUs buy, counted: memory of each, bytes that they exchange, and a simulated time of a step.

python -m reasonrec.recipes.sizing.processes
python -m reasonrec.recipes.sizing.processes --model Qwen/Qwen3-0.6B --method lora --batch 16 --length 512

Memory starts from what one device needs (`memory.py`). DDP holds all of it in each process, FSDP2 shares out what
belongs to weights, as ZeRO-3 does (Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054, sections 5 and 7, which
also count what is exchanged). Nothing is measured here: rates of computing and of links are given, and are bounds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from reasonrec.recipes.args import parse, run
from reasonrec.recipes.keys import TRUST_HELP
from reasonrec.recipes.models.load import Method
from reasonrec.recipes.models.precision import Precision
from reasonrec.recipes.sizing.machine import GIB
from reasonrec.recipes.sizing.memory import FLOAT32, NF4_BYTES, Load, Shape, memory
from reasonrec.tokenizers.terminal import say

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Shapes by number, so that nothing has to be downloaded: layers, hidden, inner, heads, key heads, vocabulary, tied.
SHAPES = {
    "smollm2-135m": (30, 576, 1536, 9, 3, 49152, True),
    "llama-like-1.7b": (24, 2048, 8192, 32, 32, 49152, True),
    "llama-like-8b": (32, 4096, 14336, 32, 8, 128256, False),
}


@dataclass
class ProcessesConfig:
    """What is counted."""

    model: str | None = field(
        default=None, metadata={"help": f"folder or name on the Hub; unset for {', '.join(SHAPES)}", "path": True}
    )
    method: Method = field(default="full", metadata={"help": "full, lora or qlora"})
    batch: int = field(default=8, metadata={"help": "examples of a batch on one GPU", "at_least": 1})
    length: int = field(default=512, metadata={"help": "tokens of the longest example", "at_least": 1})
    checkpointing: bool = field(default=True, metadata={"help": "compute activations twice instead of keeping them"})
    code_rows: int = field(default=768, metadata={"help": "code embeddings that are trained", "at_least": 1})
    gpus: list[int] = field(default_factory=lambda: [1, 2, 8, 16], metadata={"help": "how many GPUs", "at_least": 1})
    per_machine: int = field(default=8, metadata={"help": "GPUs of one machine", "at_least": 1})
    tflops: float = field(default=200, metadata={"help": "10^12 operations a second that a GPU sustains", "above": 0})
    link: float = field(default=100, metadata={"help": "GB/s of a GPU to those of its machine", "above": 0})
    network: float = field(default=10, metadata={"help": "GB/s of a GPU to those of other machines", "above": 0})
    trust_remote_code: bool = field(default=False, metadata={"help": TRUST_HELP})


@dataclass(frozen=True)
class Parts:
    """Bytes of a model, by what is exchanged of them.

    Attributes:
        layers: Weights of all layers.
        shared: What of them FSDP2 shares out: 4-bit weights stay whole.
        others: Embeddings, output layer and norms: the group that stays whole during a step.
        added: What LoRA and the code embeddings add.
        copies: What autocast keeps of the layers, as they are cast.
    """

    layers: float
    shared: float
    others: float
    added: float
    copies: float

    @classmethod
    def of(cls, shape: Shape, load: Load, precision: Precision) -> Parts:
        """Those that `memory` adds up as weights."""
        width, full = precision.dtype.itemsize, load.method == "full"
        stored = FLOAT32 if full else width
        four_bit = load.method == "qlora" and precision.device.type != "cpu"
        layers = shape.linear * (NF4_BYTES if four_bit else stored)
        others = float(shape.others * stored)
        copies = float(shape.linear * width if full and width < FLOAT32 else 0)
        added = memory(shape, load, precision)["weights"] - layers - others - copies
        return cls(layers, 0.0 if four_bit else layers, others, added, copies)


def memory_of_each(
    shape: Shape, load: Load, precision: Precision, processes: int, *, sharded: bool
) -> dict[str, float]:
    """The terms of a training's memory on each of several devices.

    DDP keeps the gradients once more, in the buckets that are all-reduced. FSDP2 gathers one layer at a time, beside
    the group of the embeddings, and where they are trained their gradients are whole until they are scattered. What
    autocast has cast of a layer is counted whole, which is the most that it can be.

    Args:
        shape: The base model's.
        load: What is trained, and on how much at a time by one device.
        precision: What is computed in, and where.
        processes: Devices.
        sharded: FSDP2 instead of DDP.

    Returns:
        Bytes by name; with one device those of `memory`.
    """
    terms = memory(shape, load, precision)
    if processes == 1:
        return terms
    if not sharded:
        return terms | {"buckets": terms["gradients"]}
    parts = Parts.of(shape, load, precision)
    divided = parts.shared + parts.others + parts.added
    gathered = parts.shared / shape.layers + parts.others
    if load.method == "full":
        gathered *= 2  # their gradients, before they are scattered
    return terms | {
        "weights": terms["weights"] - divided * (1 - 1 / processes),
        "gradients": terms["gradients"] / processes,
        "optimiser": terms["optimiser"] / processes,
        "gathered": gathered,
    }


def rolling_out(shape: Shape, load: Load, precision: Precision, processes: int) -> float:
    """Bytes on each device while `grpo` lends whole weights under FSDP2: these, the shards, and the optimiser's.

    Caches of keys and values come on top.
    """
    terms = memory(shape, load, precision)
    if processes == 1:
        return terms["weights"] + terms["optimiser"]
    parts = Parts.of(shape, load, precision)
    divided = parts.shared + parts.others + parts.added
    return terms["weights"] + (divided + terms["optimiser"]) / processes


def exchanged(shape: Shape, load: Load, precision: Precision, processes: int, *, sharded: bool) -> float:
    """Bytes that each device sends in a step of one batch.

    DDP: an all-reduce of the gradients, in a ring. FSDP2: layers are gathered forward and again backward, the
    embeddings once, and gradients are scattered.
    """
    gradients = memory(shape, load, precision)["gradients"]
    parts = Parts.of(shape, load, precision)
    moved = 2 * (parts.shared + parts.added) + parts.others + gradients if sharded else 2 * gradients
    return moved * (processes - 1) / processes


def operations(shape: Shape, load: Load) -> float:
    """Operations of a step on one device: two a weight and token forward, as many again for each gradient.

    Frozen weights need no gradient of their own, and checkpointing goes forward twice. Attention and the output layer
    are left out.
    """
    passes = (3 if load.method == "full" else 2) + load.checkpointing
    return 2.0 * passes * shape.linear * load.batch * load.length


def rows(name: str, shape: Shape, load: Load, config: ProcessesConfig) -> Iterator[str]:
    """The table of one model."""
    precision = Precision("bf16", torch.device("cuda"), "")
    seconds = operations(shape, load) / (config.tflops * 1e12)
    weights = (shape.linear + shape.others) / 1e6
    kept = "computed twice" if load.checkpointing else "kept"
    yield (
        f"{name}: {weights:.0f} million weights, {load.method}, bf16, {load.batch} × {load.length} tokens a GPU, "
        f"activations {kept}"
    )
    yield "    GPUs         GiB each  grpo rolls out  GB sent   simulated: sending/computing s  times one GPU"
    for processes in config.gpus:
        for sharded in (False, True) if processes > 1 else (False,):
            needed = sum(memory_of_each(shape, load, precision, processes, sharded=sharded).values())
            lent = rolling_out(shape, load, precision, processes if sharded else 1)
            sent = exchanged(shape, load, precision, processes, sharded=sharded) if processes > 1 else 0.0
            rate = config.link if processes <= config.per_machine else config.network
            sending = sent / (rate * 1e9)
            low = processes * seconds / (seconds + sending)
            high = processes * seconds / max(seconds, sending)
            kind = "FSDP2" if sharded else "DDP" if processes > 1 else "alone"
            yield (
                f"    {processes:>3} {kind:<6} {needed / GIB:11.2f} {lent / GIB:15.2f} {sent / 1e9:8.2f} "
                f"{sending:19.3f}/{seconds:.3f} {low:15.1f} to {high:.1f}"
            )


def shapes(model: str | None, *, trust_remote_code: bool = False) -> Iterator[tuple[str, Shape]]:
    """A named model's shape, or those of `SHAPES`."""
    from transformers import AutoConfig, LlamaConfig

    if model is not None:
        from reasonrec.recipes.models.load import resolve_model

        config = AutoConfig.from_pretrained(resolve_model(model), trust_remote_code=trust_remote_code)
        yield model, Shape.of(config, trust_remote_code=trust_remote_code)
        return
    for name, (layers, hidden, inner, heads, keys, vocabulary, tied) in SHAPES.items():
        built: PretrainedConfig = LlamaConfig(
            num_hidden_layers=layers, hidden_size=hidden, intermediate_size=inner, num_attention_heads=heads,
            num_key_value_heads=keys, vocab_size=vocabulary, tie_word_embeddings=tied,
        )  # fmt: skip
        yield name, Shape.of(built)


def main() -> None:
    """Parse, count, say."""
    (config,) = parse([ProcessesConfig])
    load = Load(config.method, config.batch, config.length, config.checkpointing, code_rows=config.code_rows)
    for name, shape in shapes(config.model, trust_remote_code=config.trust_remote_code):
        for line in rows(name, shape, load, config):
            say(line)


if __name__ == "__main__":
    run(main)()
