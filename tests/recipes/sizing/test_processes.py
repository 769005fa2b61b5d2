"""What several GPUs need and exchange, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from reasonrec.recipes.models.precision import Precision
from reasonrec.recipes.sizing.memory import Load, Shape, memory
from reasonrec.recipes.sizing.processes import (
    ProcessesConfig,
    exchanged,
    memory_of_each,
    operations,
    rolling_out,
    rows,
    shapes,
)

CPU = Precision("fp32", torch.device("cpu"), "")
GPU = Precision("bf16", torch.device("cuda"), "")
SHAPE = Shape(
    layers=2, hidden=8, inner=16, queries=8, keys=4, vocabulary=100, linear=1000, others=900, lora_per_rank=50
)
FULL = Load("full", 3, 10, True)
LORA = Load("lora", 3, 10, True, rank=2, code_rows=5)  # 2 · 50 + 5 · 8 = 140 trained weights


@pytest.mark.parametrize("load", [FULL, LORA, replace(LORA, method="qlora")])
@pytest.mark.parametrize("sharded", [False, True])
def test_one_process_needs_what_one_device_needs(load: Load, sharded: bool) -> None:
    assert memory_of_each(SHAPE, load, GPU, 1, sharded=sharded) == memory(SHAPE, load, GPU)
    assert exchanged(SHAPE, load, GPU, 1, sharded=sharded) == 0


def test_ddp_holds_everything_and_the_gradients_once_more() -> None:
    assert memory_of_each(SHAPE, FULL, CPU, 8, sharded=False) == memory(SHAPE, FULL, CPU) | {"buckets": 1900 * 4}
    # A ring of four sends each gradient twice, but for a quarter.
    assert exchanged(SHAPE, FULL, CPU, 4, sharded=False) == 2 * 1900 * 4 * 3 / 4


def test_fsdp2_shares_out_weights_gradients_and_moments() -> None:
    alone, each = memory(SHAPE, FULL, CPU), memory_of_each(SHAPE, FULL, CPU, 4, sharded=True)
    assert each == pytest.approx(
        {
            "weights": 1900, "gradients": 1900, "optimiser": 3800, "activations": alone["activations"],
            "logits": alone["logits"], "gathered": 2 * (500 + 900) * 4,
        }
    )  # fmt: skip
    # Layers are gathered twice, the others once, and 1900 gradients are scattered.
    assert exchanged(SHAPE, FULL, CPU, 4, sharded=True) == (2 * 1000 + 900 + 1900) * 4 * 3 / 4
    # What autocast has cast of the layers is not shared out.
    assert memory_of_each(SHAPE, FULL, GPU, 4, sharded=True)["weights"] == pytest.approx(1900 + 1000 * 2)


def test_fsdp2_with_adapters() -> None:
    each = memory_of_each(SHAPE, LORA, GPU, 2, sharded=True)
    assert each["weights"] == pytest.approx((1900 * 2 + 140 * 4) / 2)
    assert each["gathered"] == pytest.approx((500 + 900) * 2), "frozen weights have no gradients"
    four_bit = memory_of_each(SHAPE, replace(LORA, method="qlora"), GPU, 2, sharded=True)
    assert four_bit["weights"] == pytest.approx(1000 * 0.516 + (900 * 2 + 140 * 4) / 2), "4 bits stay whole"
    assert four_bit["gathered"] == pytest.approx(900 * 2)


def test_rollouts_are_lent_whole_weights() -> None:
    assert rolling_out(SHAPE, FULL, CPU, 1) == 1900 * (4 + 8)
    assert rolling_out(SHAPE, FULL, CPU, 4) == 1900 * 4 + 1900 * (4 + 8) / 4


def test_operations() -> None:
    assert operations(SHAPE, FULL) == 8 * 1000 * 30
    assert operations(SHAPE, replace(LORA, checkpointing=False)) == 4 * 1000 * 30


def test_the_table_names_shapes_and_both_ways() -> None:
    name, shape = next(shapes(None))
    assert (name, shape.linear + shape.others) == ("smollm2-135m", 134_515_008)
    head, *_, last = rows(name, shape, FULL, ProcessesConfig())
    assert head.startswith("smollm2-135m: 135 million weights, full, bf16, 3 × 10 tokens a GPU")
    assert last.split()[:2] == ["16", "FSDP2"]
