"""What a second CPU process buys: a training step alone, under DDP and under FSDP2, side by side.

python tests/benchmarks/processes.py

Each process has one thread and a batch of its own, in fp32, of a small Llama-like decoder with random weights, wrapped
by PyTorch as accelerate wraps it (a group for each layer; embeddings with the whole model) and updated by AdamW. One
process and two take turns, so that all meet the same machine; read the ratios. Writes `runs/bench/processes.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from reasonrec.tokenizers.artefact import write_json

ARMS = {"alone": 1, "ddp": 2, "fsdp2": 2}


def work(arm: str, steps: int, batch: int, length: int) -> None:
    """Time steps in one of the processes; the first one prints the median in seconds."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    config = LlamaConfig(
        num_hidden_layers=6, hidden_size=256, intermediate_size=768, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=4096, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    called: torch.nn.Module = model
    if arm == "ddp":
        called = DistributedDataParallel(model)
    elif arm == "fsdp2":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(4096, (batch, length))
    times = []
    for _ in range(steps + 2):  # two to warm up
        began = time.perf_counter()
        called(input_ids=tokens, labels=tokens).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        times.append(time.perf_counter() - began)
    if dist.get_rank() == 0:
        print(json.dumps(statistics.median(times[2:])))
    dist.destroy_process_group()


def launch(arm: str, words: list[str]) -> float:
    """Seconds of a step of one arm."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ARMS[arm])]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, __file__, "--arm", arm, *words], env=env, stdout=subprocess.PIPE, text=True, check=True
    )
    return float(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Let the arms take turns, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 256], help="tokens of an example")
    parser.add_argument("--batch", type=int, default=4, help="examples of each process")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        work(args.arm, args.steps, args.batch, args.lengths[0])
        return
    found = []
    for length in args.lengths:
        words = ["--steps", str(args.steps), "--batch", str(args.batch), "--lengths", str(length)]
        turns = [{arm: launch(arm, words) for arm in ARMS} for _ in range(args.rounds)]
        for arm in ARMS:
            ratios = [turn[arm] / turn["alone"] for turn in turns]
            examples = [ARMS[arm] / ratio for ratio in ratios]
            found.append({"length": length, "arm": arm, "step": ratios, "examples": examples})
            print(
                f"{args.batch} × {length} tokens, {arm:<6} a step takes {statistics.median(ratios):.2f} of one alone "
                f"({min(ratios):.2f} to {max(ratios):.2f}), examples a second {statistics.median(examples):.2f} times",
                flush=True,
            )
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    write_json(Path("runs/bench/processes.json"), {"machine": machine, "found": found})


if __name__ == "__main__":
    main()
