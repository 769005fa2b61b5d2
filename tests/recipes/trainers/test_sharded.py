"""Supervised training on weights that two processes share out (FSDP2): the losses and gradients of one process.

Accelerate turns FSDP on for accelerators only, and a run on CPUs would be DDP in silence, so `fully_shard` is applied
here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

WORKER = '''
import json, sys
from pathlib import Path
import numpy as np
import torch
import torch.distributed as dist
from conftest import CODES, kit_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from reasonrec.recipes.policies.base import install

base, out = sys.argv[1:3]
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))


def build(method):
    kit = kit_of(Path(base), method)
    install(kit.base, kit.policy.answers)
    return kit


def batch(kit, number):
    """Three histories, in which each code behind the first item and some words have a label."""
    tokenizer, vocabulary = kit.tokenizer, kit.vocabulary
    ids, rng, rows = vocabulary.item_token_ids(CODES), np.random.default_rng(number), []
    for length in (2, 3, 5):
        words = tokenizer("a steel kettle" if number else "History:")["input_ids"]
        items = [token for item in rng.integers(0, len(CODES), length) for token in ids[item]]
        rows.append([*words, *items, vocabulary.begin_id, *ids[number], tokenizer.eos_token_id])
    longest = max(map(len, rows))
    spare = [longest - len(row) for row in rows]
    pad = tokenizer.pad_token_id
    return {
        "input_ids": torch.tensor([row + [pad] * n for row, n in zip(rows, spare)]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * n for row, n in zip(rows, spare)]),
        "labels": torch.tensor([[-100, *row[1:]] + [-100] * n for row, n in zip(rows, spare)]),
    }


said = {}
for method in ("full", "lora", "qlora"):
    alone = build(method)
    losses = [alone.model(**batch(alone, number), fused_lm_head=True).loss for number in range(2)]
    sum(losses).div(2).backward()  # as two processes average
    gradients = {name: p.grad for name, p in alone.model.named_parameters() if p.requires_grad}

    kit = build(method)
    sharded = kit.model
    for layer in kit.base.base_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    loss = sharded(**batch(kit, rank), fused_lm_head=True).loss
    loss.backward()
    trained = {name: p for name, p in sharded.named_parameters() if p.requires_grad}
    assert trained.keys() == gradients.keys()
    said[method] = {
        "all parameters are shards": all(isinstance(p, DTensor) for p in sharded.parameters()),
        "loss": [loss.item(), losses[rank].item()],
        "gradients differ by": max(
            ((p.grad.full_tensor() - gradients[name]).norm() / gradients[name].norm().clamp(min=1e-12)).item()
            for name, p in trained.items()
        ),
        "rows move": any("embed_tokens" in name and bool(g.abs().sum() > 0) for name, g in gradients.items()),
    }
Path(out, f"said-{rank}.json").write_text(json.dumps(said))
dist.destroy_process_group()
'''


def test_losses_and_gradients_are_those_of_one_process(
    tiny_base: Path, torchrun: Callable[..., object], tmp_path: Path
) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    torchrun(tmp_path / "worker.py", tiny_base, tmp_path, PYTHONPATH=str(Path(__file__).parent))
    for rank in (0, 1):
        said = json.loads((tmp_path / f"said-{rank}.json").read_text())
        assert said.keys() == {"full", "lora", "qlora"}
        for found in said.values():
            assert found["all parameters are shards"]
            assert found["rows move"]
            sharded, alone = found["loss"]
            assert sharded == pytest.approx(alone, rel=1e-4)
            assert found["gradients differ by"] < 1e-4
