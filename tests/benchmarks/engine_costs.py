"""Costs of the item search that no language model is needed for, on synthetic catalogues of any size."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from reasonrec.recipes.decoding.attention import additive, branch_attention
from reasonrec.recipes.decoding.beams import Beams, choose
from reasonrec.recipes.decoding.prefix import forward, read
from reasonrec.recipes.models import precision
from reasonrec.recipes.models.load import resolve_model
from reasonrec.tokenizers.constrain import ItemLogitsProcessor
from reasonrec.tokenizers.trie import Trie
from reasonrec.tokenizers.vocabulary import Vocabulary

LEVELS = (256, 256, 256, 256)
ROWS = 400
VOCABULARY = 152_000
USERS = 8  # times 50 beams


def synthetic_codes(n: int, seed: int = 0) -> np.ndarray:
    """Distinct random codes (n, 4)."""
    rng = np.random.default_rng(seed)
    keys = np.unique(rng.integers(0, 2**32, size=int(n * 1.02) + 10, dtype=np.int64))
    keys = rng.permutation(keys)[:n]
    return np.stack([(keys >> shift) & 255 for shift in (24, 16, 8, 0)], 1).astype(np.int32)


def seconds(work: Callable[[], Any], device: str) -> float:
    """Wall time of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def median_ms(work: Callable[[], Any], device: str, repeats: int = 9) -> float:
    """Median wall time in milliseconds, after one call to warm up."""
    return float(np.median([seconds(work, device) * 1e3 for _ in range(repeats + 1)][1:]))


def measure_trie(options: argparse.Namespace) -> dict[str, Any]:
    """Time and memory of building the trie."""
    rows = []
    for n in options.trie_sizes:
        codes = synthetic_codes(n)
        begin = time.perf_counter()
        trie = Trie.from_codes(codes, LEVELS)
        taken = time.perf_counter() - begin
        rows.append(
            {"items": n, "nodes": trie.n_nodes, "seconds": round(taken, 2), "mb": round(trie.n_bytes / 1e6, 1)}
        )
    return {"levels": LEVELS, "rows": rows}


def measure_processor(options: argparse.Namespace) -> dict[str, Any]:
    """The logits processor beside one in-place fill of the logits, at every position of an answer."""
    device = options.device
    scores = torch.randn(ROWS, VOCABULARY, device=device)
    median_ms(lambda: scores.fill_(1.0), device, 20)  # until the memory is in place
    rng = np.random.default_rng(1)
    first = VOCABULARY - sum(LEVELS) - 1
    vocabulary = Vocabulary(LEVELS, first)
    offset = np.cumsum([0, *LEVELS[:-1]]) + vocabulary.first_id
    rows = []
    for n in tqdm(options.sizes, desc="processor", unit="catalogue"):
        codes = synthetic_codes(n)
        processor = ItemLogitsProcessor(Trie.from_codes(codes, LEVELS).to(device), vocabulary, eos_id=2)
        items = codes[rng.integers(0, n, ROWS)] + offset
        row: dict[str, Any] = {"items": n}
        for step in range(len(LEVELS) + 1):
            text = rng.integers(3, 1000, (ROWS, 30))
            ids = np.concatenate([text, np.full((ROWS, 1), vocabulary.begin_id), items[:, :step]], 1)
            input_ids = torch.from_numpy(ids).to(device)
            # In turns, so that both meet the same machine.
            fills, ours = [], []
            for _ in range(9):
                fills.append(median_ms(lambda: scores.fill_(1.0), device, 1))
                ours.append(median_ms(lambda p=processor, i=input_ids: p(i, scores), device, 1))
            row[f"step {step}"] = round(float(np.median(np.divide(ours, fills))), 2)
            row["fill_ms"] = round(float(np.median(fills)), 2)
        row["worst"] = max(v for k, v in row.items() if k.startswith("step"))
        rows.append(row)
    return {"logits": [ROWS, VOCABULARY], "unit": "times one in-place fill", "rows": rows}


@torch.no_grad()
def measure_choice(options: argparse.Namespace) -> dict[str, Any]:
    """Choosing among legal codes beside the model's forward pass of the same 400 beams."""
    device = options.device
    dtype = precision.choose(options.precision, device).dtype
    model = AutoModelForCausalLM.from_pretrained(resolve_model(options.model), dtype=dtype).to(device).eval()
    beams = ROWS // USERS
    prompts = torch.randint(10, 1000, (USERS, 32), device=device)
    prefix = read(model, prompts, torch.ones_like(prompts), room=beams)
    tokens = torch.randint(10, 1000, (USERS, beams), device=device)
    seen = torch.ones(USERS, beams, prefix.length + beams, dtype=torch.bool, device=device)
    positions = torch.full((USERS, beams), 32, device=device)

    def step_forward() -> None:
        prefix.cache.rewind(prefix.length)
        forward(model, prefix.cache, tokens, positions, seen)

    step_ms = median_ms(step_forward, device, 5)
    rng = np.random.default_rng(1)
    logits = torch.randn(USERS, beams, sum(LEVELS), device=device)
    score = torch.randn(USERS, beams, device=device).sort(descending=True).values
    nothing = Beams.none(USERS, device)
    rows = []
    for n in tqdm(options.sizes, desc="choice", unit="catalogue"):
        codes = synthetic_codes(n)
        trie = Trie.from_codes(codes, LEVELS).to(device)
        items = torch.from_numpy(rng.integers(0, n, (USERS, beams))).to(device)
        paths = trie.paths(items)
        excluded = trie.excluded_ranks([rng.integers(0, n, 10) for _ in range(USERS)])
        row: dict[str, Any] = {"items": n}
        for step in range(1, len(LEVELS)):
            node = paths[..., step - 1].contiguous()
            zero = torch.zeros_like(node)
            last = Beams(node, score, zero - 1, zero + step, zero, zero)
            taken = median_ms(
                lambda t=trie, s=step, r=last, w=nothing, e=excluded: choose(
                    t, logits, r, w, first=0, width=t.widths[s], k=beams, keep=beams, excluded=e
                ),
                device,
            )
            row[f"level {step}"] = f"{100 * taken / (step_ms + taken):.1f}%"
        rows.append(row)
    return {"beams": [USERS, beams], "step_ms": round(step_ms, 1), "unit": "share of a step", "rows": rows}


@torch.no_grad()
def measure_attention(options: argparse.Namespace) -> dict[str, Any]:
    """The search's attention beside PyTorch's fused kernel, in the shapes of SmolLM2-135M."""
    device = options.device
    heads, key_heads, size = 9, 3, 64
    layer = torch.nn.Module()
    layer.num_key_value_groups = heads // key_heads
    shapes = ((16, 20, 50), (16, 50, 80), (16, 20, 300))
    rows = []
    for dtype, (users, new, slots) in product((torch.bfloat16, torch.float32), shapes):
        query = torch.randn(users, new, heads, size, dtype=dtype, device=device).transpose(1, 2)
        key, value = torch.randn(2, users, key_heads, slots, size, dtype=dtype, device=device)
        seen = torch.rand(users, 1, new, slots, device=device) < 0.6
        mask = additive(seen, dtype)
        fused, ours = [], []
        for _ in range(9):  # in turns
            arguments = (layer, query, key, value)
            fused.append(median_ms(lambda a=arguments, m=seen: sdpa_attention_forward(*a, m), device, 1))
            ours.append(median_ms(lambda a=arguments, m=mask: branch_attention(*a, m), device, 1))
        rows.append(
            {
                "name": f"{str(dtype).split('.')[1]}, {users} users, {new} beams, {slots} slots",
                "fused_ms": round(float(np.median(fused)), 2),
                "of_fused": round(float(np.median(np.divide(ours, fused))), 2),
            }
        )
    return {"rows": rows}
