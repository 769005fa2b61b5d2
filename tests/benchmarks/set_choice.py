"""What choosing among legal codes costs beside the model, where items are sets of parallel codes.

    python tests/benchmarks/set_choice.py

A step of the search reads one token for each beam, and then asks the set index what is legal behind each prefix. Both
are timed for prefixes of every length, on catalogues with drawn codes; medians. Prints a table, and writes
runs/bench/set_choice.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from reasonrec.recipes.decoding.prefix import forward, read
from reasonrec.recipes.policies.parallel_codes.laws import Law, log_probs, next_books
from reasonrec.recipes.policies.parallel_codes.sets import SetIndex
from reasonrec.tokenizers.artefact import write_json
from reasonrec.tokenizers.terminal import say

LIMIT = 0.05  # share of a step
LAWS: tuple[Law, ...] = ("crss", "free")
HISTORY = 60  # tokens of the prompt


def timed(work: Callable[[], object], repeats: int) -> float:
    """Median seconds of a call, the first one left out."""
    seconds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])


def catalogue(items: int, depth: int, size: int) -> np.ndarray:
    """Different sets of drawn codes."""
    drawn = np.random.default_rng(0).integers(size, size=(items + items // 10 + 100, depth))
    return np.unique(drawn, axis=0)[:items]


def choose(law: Law, sets: SetIndex, logits: torch.Tensor, chosen: torch.Tensor) -> None:
    """What a step chooses from."""
    books = next_books(law, sets, logits, chosen)
    log_probs(sets, logits, books, sets.after(chosen, books).fits > 0)


@torch.no_grad()
def model_step(beams: int, repeats: int) -> float:
    """Seconds in which SmolLM2-135M's layers, untrained, read a token for each beam behind one prompt."""
    config = AutoConfig.for_model(
        "llama", hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=1000, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(0, 1000, (1, HISTORY))
    prefix = read(model, ids, torch.ones_like(ids), room=beams)
    seen = torch.cat([prefix.seen[:, None].expand(-1, beams, -1), torch.eye(beams, dtype=torch.bool)[None]], 2)
    position = prefix.position[:, None].expand(-1, beams)
    token = torch.randint(0, 1000, (1, beams))

    def step() -> None:
        prefix.cache.rewind(prefix.length)
        forward(model, prefix.cache, token, position, seen)

    return timed(step, repeats)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--size", type=int, default=300)
    parser.add_argument("--beams", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/set_choice.json"))
    options = parser.parse_args()
    torch.manual_seed(0)
    step = model_step(options.beams, options.repeats)
    say(f"the model reads {options.beams} tokens in {step * 1000:.0f} ms ({torch.get_num_threads()} threads)")
    rows: list[dict[str, Any]] = []
    for items in options.items:
        for depth in options.depths:
            codes = catalogue(items, depth, options.size)
            begin = time.perf_counter()
            sets = SetIndex.from_codes(codes, [options.size] * depth)
            built = time.perf_counter() - begin
            logits = torch.randn(options.beams, sets.n_columns)
            for law in LAWS:
                worst = 0.0
                for length in range(1, min(depth, 4)):
                    known = sets.columns[torch.randint(0, items, (options.beams,))]
                    chosen = torch.full_like(known, -1)
                    which = torch.rand(known.shape).argsort(1)[:, :length]
                    chosen = chosen.scatter(1, which, known.gather(1, which))
                    worst = max(worst, timed(partial(choose, law, sets, logits, chosen), options.repeats))
                rows.append({"items": items, "depth": depth, "law": law, "built": built, "seconds": worst,
                             "share": worst / (worst + step)})  # fmt: skip
                say(
                    f"{items:>9,} items, {depth} codes, {law:>4}: {worst * 1000:6.1f} ms at most, "
                    f"{worst / (worst + step):6.1%} of a step (limit {LIMIT:.0%}); built in {built:.2f} s"
                )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, {"model_step": step, "rows": rows})


if __name__ == "__main__":
    main()
