"""The counted terms: exact where a real model can be asked, by hand elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from reasonrec.recipes.models.load import LoraSettings, add_adapter
from reasonrec.recipes.models.precision import Precision
from reasonrec.recipes.sizing.memory import Load, Shape, memory
from reasonrec.recipes.sizing.training import advice

CPU = Precision("fp32", torch.device("cpu"), "")
GPU = Precision("bf16", torch.device("cuda"), "")
SHAPE = Shape(
    layers=2, hidden=8, inner=16, queries=8, keys=4, vocabulary=100, linear=1000, others=900, lora_per_rank=50
)


@pytest.fixture(scope="module")
def shape(tiny_base: Path) -> Shape:
    return Shape.of(AutoConfig.from_pretrained(tiny_base))


def test_weights_are_those_of_the_model(shape: Shape, tiny_base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    assert shape.linear + shape.others == sum(p.numel() for p in model.parameters())
    assert shape.vocabulary == model.get_input_embeddings().weight.shape[0]
    fewer = Shape.of(AutoConfig.from_pretrained(tiny_base), layers=1)
    assert (fewer.layers, fewer.linear) == (1, shape.linear // shape.layers)


def test_lora_is_that_of_peft(shape: Shape, tiny_base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    adapted = add_adapter(model, [0, 1], LoraSettings(4, 8, 0.0, "all-linear"))
    trained = sum(p.numel() for n, p in adapted.named_parameters() if "lora_" in n)
    assert shape.lora_per_rank * 4 == trained
    terms = memory(shape, Load("lora", 1, 1, True, rank=4), CPU)
    assert terms["gradients"] == trained * 4
    assert terms["optimiser"] == trained * 8


def test_by_hand() -> None:
    # A layer keeps 5·8 + 3·8 + 3·4 + 4·16 = 140 numbers of each of 3 · 10 tokens.
    kept = memory(SHAPE, Load("lora", 3, 10, False, rank=2, code_rows=5), GPU)
    assert kept == {
        "weights": 1900 * 2 + (2 * 50 + 5 * 8) * 4, "gradients": 140 * 4, "optimiser": 140 * 8,
        "activations": 30 * 2 * 2 * 140, "logits": 30 * 5 * 12,
    }  # fmt: skip
    again = memory(SHAPE, Load("lora", 3, 10, True, rank=2, code_rows=5, words=True), GPU)
    assert again["activations"] == 30 * 2 * (2 * 8 + 140)
    assert again["logits"] == 30 * 100 * 12
    full = memory(SHAPE, Load("full", 3, 10, True), GPU)
    assert full["weights"] == 1900 * 4 + 1000 * 2
    assert full["optimiser"] == 1900 * 8
    four_bit = memory(SHAPE, Load("qlora", 3, 10, True, rank=2), GPU)
    assert four_bit["weights"] == pytest.approx(1000 * 0.516 + 900 * 2 + 100 * 4)
    assert memory(SHAPE, Load("qlora", 3, 10, True, rank=2), CPU)["weights"] == 1900 * 4 + 100 * 4


def test_what_would_help_is_said_by_what_it_saves() -> None:
    load, shape = Load("full", 4, 1000, False), replace(SHAPE, layers=6)
    needed = sum(memory(shape, load, GPU).values())
    assert list(advice(shape, load, GPU, free=needed)) == [
        f"it fits: {needed / 2**30:.2f} of {needed / 2**30:.1f} GiB"
    ]
    first, *changes, last = advice(shape, load, GPU, free=needed / 2)
    assert first.startswith("it does not fit")
    assert changes[0].startswith("    --activation_checkpointing true: ")
    assert changes[0].endswith("which is enough")
    assert last.startswith("    a smaller max_history")
    small = replace(load, method="qlora", checkpointing=True, batch=1)
    assert list(advice(shape, small, GPU, free=1))[1:] == [last], "nothing is advised that saves nothing"
