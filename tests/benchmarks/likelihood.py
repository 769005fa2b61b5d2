"""Checkpoints of one dataset by the likelihood of its validation items, each paired with the first.

python tests/benchmarks/likelihood.py runs/demo/sft runs/demo/grpo

Nats for the next item among those that are not masked. Each checkpoint has one temperature at each level of an answer,
fitted on one half of the users and judged on the other, both ways round; intervals are over users. Likelihood tells
arms of a training apart that hit rates of a thousand users cannot.

Of checkpoints with experts (`--fused`), what the model adds to them on the *test* cases, which nothing was chosen on,
under weights that were fitted on validation cases.

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
from reasonrec.recipes.rankers.pool import MODEL, losses
from reasonrec.recipes.rankers.pooled import MOST_ROWS, Heard, sampled
from reasonrec.recipes.rankers.reasoning import Reasoner, Thinking
from reasonrec.recipes.recommender import Recommender
from reasonrec.tokenizers.artefact import read_manifest


def added_on_test(path: str, options: argparse.Namespace) -> dict[str, object]:
    """Nats of the test targets by the model, by its experts, and by both."""
    manifest = read_manifest(path)
    dataset = training_data(manifest, path)
    recommender = Recommender.from_pretrained(path, dtype=options.precision)
    assert recommender.pool is not None, f"{path} has no experts"
    experts, test = recommender.pool.experts, sampled(dataset.rows("test"), options.seed, options.max_rows)
    valid = sampled(dataset.rows("valid"), options.seed, options.max_rows)
    fitted, judged = (Heard.of(recommender, experts, rows, batch_size=options.batch_size) for rows in (valid, test))
    found = {
        " + ".join(names): losses(judged.levels, judged.voices, fitted.weights(names), test.height)
        for names in ([MODEL], list(experts), [MODEL, *experts])
    }
    _, without, within = found.values()
    low, high = mean_interval(test["user"].to_numpy(), within - without, seed=options.seed)
    row = {
        "model": path,
        "cases": test.height,
        "nats": {name: round(float(values.mean()), 4) for name, values in found.items()},
    }
    row |= {"added": float((within - without).mean()), "ci95": [low, high]}
    print(f"test: {row['nats']}, the model adds {row['added']:+.3f} [{low:+.3f}, {high:+.3f}]: {path}")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["runs/demo/sft", "runs/demo/grpo"])
    parser.add_argument("--reasoning_models", nargs="*", default=[])
    parser.add_argument("--fused", nargs="*", default=[])
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
        recommender = Recommender.from_pretrained(path, dtype=options.precision)
        if thinks:
            reasoner = Reasoner(recommender, batch_size=options.batch_size)
            own, _ = thought_nats(reasoner, valid, Thinking(1, options.max_chain), seed=options.seed)
        else:
            own = nats(recommender, valid, batch_size=options.batch_size, seed=options.seed)
        first = own if first is None else first
        low, high = mean_interval(valid["user"].to_numpy(), own - first, seed=options.seed)
        row = {
            "model": path,
            "thinks": thinks,
            "nats": own.mean(),
            "difference": (own - first).mean(),
            "ci95": [low, high],
        }
        row["tokens"] = trained_tokens(path)
        found.append(row)
        print(
            f"{row['nats']:.3f} nats, {row['difference']:+.3f} [{low:+.3f}, {high:+.3f}] against the first, "
            f"{row['tokens']} tokens of its last training: {path}{', behind its own chain' if thinks else ''} "
            f"({len(own)} cases, {recommender.precision})"
        )
    found += [added_on_test(path, options) for path in options.fused]
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    Path(options.out).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
