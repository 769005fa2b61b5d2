"""Checkpoints of one dataset by the likelihood of its validation items, each paired with the first.

python tests/benchmarks/likelihood.py runs/demo/sft runs/demo/grpo

Nats for the next item among those that are not masked. Each checkpoint has one temperature at each level of an answer,
fitted on one half of the users and judged on the other, both ways round; intervals are over users. Likelihood tells
arms of a training apart that hit rates of a thousand users cannot.

With `--reasoning_models`, also behind a greedy chain of each one's own, which is blind to the target: what thinking is
worth against the first checkpoint, which had better be one that was trained on as many tokens without chains.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from reasonrec.recipes.evaluation.intervals import mean_interval
from reasonrec.recipes.models.checkpoint import trained_tokens, training_data
from reasonrec.recipes.rankers.likelihood import nats, thought_nats
from reasonrec.recipes.rankers.pooled import MOST_ROWS, sampled
from reasonrec.recipes.rankers.reasoning import Reasoner, Thinking
from reasonrec.recipes.recommender import Recommender
from reasonrec.tokenizers.artefact import read_manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["runs/demo/sft", "runs/demo/grpo"])
    parser.add_argument("--reasoning_models", nargs="*", default=[])
    parser.add_argument("--max_chain", type=int, default=64)
    parser.add_argument("--max_rows", type=int, default=MOST_ROWS)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/bench/likelihood.json")
    options = parser.parse_args()
    if missing := [path for path in options.models if not Path(path).exists()]:
        print(f"nothing to compare: {', '.join(missing)} is not there (make demo)")
        return
    found, first = [], None
    asked = [(path, False) for path in options.models] + [(path, True) for path in options.reasoning_models]
    for path, thinks in asked:
        manifest = read_manifest(path)
        valid = sampled(training_data(manifest, path).rows("valid"), options.seed, options.max_rows)
        recommender = Recommender.load(path, dtype=options.precision)
        if thinks:
            reasoner = Reasoner(recommender, batch_size=options.batch_size)
            losses, _ = thought_nats(reasoner, valid, Thinking(1, options.max_chain), seed=options.seed)
        else:
            losses = nats(recommender, valid, batch_size=options.batch_size, seed=options.seed)
        first = losses if first is None else first
        low, high = mean_interval(valid["user"].to_numpy(), losses - first, seed=options.seed)
        row = {
            "model": path,
            "thinks": thinks,
            "nats": losses.mean(),
            "difference": (losses - first).mean(),
            "ci95": [low, high],
        }
        row["tokens"] = trained_tokens(path)
        found.append(row)
        print(
            f"{row['nats']:.3f} nats, {row['difference']:+.3f} [{low:+.3f}, {high:+.3f}] against the first, "
            f"{row['tokens']} tokens of its last training: {path}{', behind its own chain' if thinks else ''} "
            f"({len(losses)} cases, {recommender.precision})"
        )
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    Path(options.out).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
