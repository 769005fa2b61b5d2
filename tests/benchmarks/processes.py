"""What a second CPU process buys: a training step alone, under DDP and under FSDP2, side by side.

python tests/benchmarks/processes.py

Each process has one thread and a batch of its own, in fp32, of a small Llama-like decoder with random weights, wrapped
by PyTorch as accelerate wraps it (a group for each layer; embeddings with the whole model) and updated by AdamW.
Alone, the second process sleeps. The arms take turns in the same two processes; read the ratios. Writes
`runs/bench/processes.json`.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ARMS = {"alone": 1, "ddp": 2, "fsdp2": 2}
LENGTHS = (32, 256)  # tokens of an example: little to compute for each gradient that is sent, and more


def work(rank: int, meeting: str, rounds: int, batch: int) -> None:
    """Time the arms in one of the two processes; the first one compares them."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel
    from transformers import LlamaConfig, LlamaForCausalLM

    from reasonrec.tokenizers.artefact import write_json

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    config = LlamaConfig(
        num_hidden_layers=6, hidden_size=256, intermediate_size=768, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=4096, tie_word_embeddings=True,
    )  # fmt: skip
    models: dict[str, torch.nn.Module] = {}
    for arm in ARMS:
        model = LlamaForCausalLM(config)
        if arm == "fsdp2":
            mesh = init_device_mesh("cpu", (2,))
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        models[arm] = DistributedDataParallel(model) if arm == "ddp" else model
    optimisers = {arm: torch.optim.AdamW(model.parameters(), lr=1e-4) for arm, model in models.items()}

    def step(arm: str, length: int) -> float:
        dist.barrier()
        began = time.perf_counter()
        if rank < ARMS[arm]:
            tokens = torch.randint(config.vocab_size, (batch, length))
            models[arm](input_ids=tokens, labels=tokens).loss.backward()
            optimisers[arm].step()
            optimisers[arm].zero_grad()
        dist.barrier()
        return time.perf_counter() - began

    found = []
    for length in LENGTHS:
        for arm in ARMS:
            step(arm, length)  # to warm up
        times = {arm: [] for arm in ARMS}  # type: dict[str, list[float]]
        for _ in range(rounds):
            for arm in ARMS:
                times[arm].append(step(arm, length))
        for arm, processes in ARMS.items():
            ratios = sorted(mine / alone for mine, alone in zip(times[arm], times["alone"], strict=True))
            low, middle, high = statistics.quantiles(ratios, n=4)
            found.append({"length": length, "arm": arm, "ratio": middle, "quartiles": [low, high]})
            if rank == 0:
                print(
                    f"{batch} × {length} tokens, {arm:<5}: a step takes {middle:.2f} of one alone "
                    f"(quartiles {low:.2f} to {high:.2f}), {processes / middle:.2f} times the examples a second",
                    flush=True,
                )
    if rank == 0:
        machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
        write_json(Path("runs/bench/processes.json"), {"machine": machine, "rounds": rounds, "found": found})
    dist.destroy_process_group()


def main() -> None:
    """Start both processes, and wait for them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="steps of each arm")
    parser.add_argument("--batch", type=int, default=4, help="examples of each process")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--meeting", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        work(args.rank, args.meeting, args.rounds, args.batch)
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--rounds", str(args.rounds), "--batch", str(args.batch)]
        command += ["--meeting", f"{folder}/meeting"]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        both = [subprocess.Popen([*command, "--rank", str(rank)], env=env) for rank in range(2)]
        ended = [process.wait() for process in both]
        if any(ended):
            raise SystemExit("a process ended with an error")


if __name__ == "__main__":
    main()
