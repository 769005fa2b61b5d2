"""A training's memory beside what is free, and what to change where that is less."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from reasonrec.data_gen.tasks.curriculum import parse_phases
from reasonrec.recipes.models.checkpoint import Setting
from reasonrec.recipes.models.load import resolve_model
from reasonrec.recipes.models.precision import Precision
from reasonrec.recipes.sizing.machine import GIB, available
from reasonrec.recipes.sizing.memory import Load, Shape, memory
from reasonrec.recipes.trainers.start import earlier_training
from reasonrec.tokenizers.index import ItemIndex

if TYPE_CHECKING:
    from reasonrec.recipes.sft import SftStage

CODES_ONLY = {"seqrec", "item2item"}  # tasks without words in their answers


def shape_of(stage: SftStage, args: Any) -> Shape:
    """The base model of a configuration."""
    from transformers import AutoConfig

    earlier = earlier_training(stage.model)
    base, layers = stage.model, stage.layers
    if earlier is not None:
        setting = Setting.stored(earlier)
        base, layers = stage.base_model or setting.base_model, setting.layers
    trust = args.trust_remote_code
    config = AutoConfig.from_pretrained(resolve_model(base), trust_remote_code=trust)
    return Shape.of(config, layers, trust_remote_code=trust)


def load_of(stage: SftStage, args: Any, length: int) -> Load:
    """What a configuration puts on it, with examples of at most `length` tokens."""
    phases = parse_phases(stage.curriculum) if stage.curriculum else []
    used = {task for ratios in [phase.ratios for phase in phases] or [stage.tasks] for task, w in ratios.items() if w}
    codes = sum(ItemIndex.load(stage.index).level_sizes) + 1 if stage.index else 0
    checkpointing = args.activation_checkpointing if args.activation_checkpointing is not None else True
    return Load(
        method=stage.method,
        batch=args.per_device_train_batch_size,
        length=length,
        checkpointing=checkpointing,
        rank=stage.lora_r,
        code_rows=codes,
        words=not used <= CODES_ONLY,
    )


def table(shape: Shape, load: Load, precision: Precision, measured: int | None) -> str:
    """The terms, and what was measured beside their sum.

    Args:
        shape: The model.
        load: What is trained.
        precision: What is computed in, and where.
        measured: Most memory of the trial in bytes; it holds the program and its libraries as well on a CPU.
    """
    terms = memory(shape, load, precision)
    kept = "computed twice" if load.checkpointing else "kept"
    head = (
        f"{load.method}, {precision.name} on {precision.device}: {shape.layers} layers of {shape.hidden}, "
        f"{load.batch} × {load.length} tokens, activations {kept}"
    )
    rows = [f"    {name:<12} {size / GIB:8.3f} GiB" for name, size in terms.items()]
    total = f"    {'counted':<12} {sum(terms.values()) / GIB:8.3f} GiB"
    free = f"    {'free':<12} {available(precision.device) / GIB:8.3f} GiB"
    program = ", Python and its libraries included" if precision.device.type == "cpu" else ""
    seen = [] if measured is None else [f"    {'measured':<12} {measured / GIB:8.3f} GiB at most{program}"]
    return "\n".join([head, *rows, total, *seen, free])


def advice(shape: Shape, load: Load, precision: Precision, free: float | None = None) -> Iterator[str]:
    """What to change, each with what it saves, where the counted memory exceeds what is free.

    Args:
        shape: The model.
        load: What is trained.
        precision: What is computed in, and where.
        free: Bytes that are free; those of the device if unset.
    """
    free = available(precision.device) if free is None else free
    needed = sum(memory(shape, load, precision).values())
    if needed <= free:
        yield f"it fits: {needed / GIB:.2f} of {free / GIB:.1f} GiB"
        return
    yield f"it does not fit: {needed / GIB:.2f} of {free / GIB:.1f} GiB; what would help:"
    half = max(1, load.batch // 2)
    changes = {
        "--activation_checkpointing true": replace(load, checkpointing=True),
        f"--per_device_train_batch_size {half} (and twice the gradient_accumulation_steps)": replace(load, batch=half),
        "--method lora": replace(load, method="lora") if load.method == "full" else load,
        "--method qlora": replace(load, method="qlora"),
    }
    saved = {flag: needed - sum(memory(shape, changed, precision).values()) for flag, changed in changes.items()}
    for flag, bytes_saved in sorted(saved.items(), key=lambda found: -found[1]):
        if bytes_saved > 0:
            enough = ", which is enough" if needed - bytes_saved <= free else ""
            yield f"    {flag}: {bytes_saved / GIB:.2f} GiB less{enough}"
    yield "    a smaller max_history, fewer layers, or a smaller model"
