"""A catalogue of a million items: how long adding a thousand takes, and how long indexing all of them.

python tests/benchmarks/large_catalogue.py               # adding
python tests/benchmarks/large_catalogue.py --index       # indexing as well
python tests/benchmarks/large_catalogue.py --index --items 250000 500000 1000000    # each size; adding to the largest
python tests/benchmarks/large_catalogue.py --index --items 100000 --quantizer balanced --quantizer_options '{}'

Vectors are drawn around centres (seeded), so no text is embedded. Adding is the whole stage but for that: checking
hashes, reading, placing and writing, with codebooks of 3 x 256 that were learned from a sample. With --index a
quantizer codes all vectors, and its codes are made unique; then it does the first level alone, and faiss' k-means the
same on the same vectors, where it is installed (`pip install faiss-cpu`). Each part runs in a process of its own,
whose seconds behind the imports (and the drawing) and whose peak memory are read.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from reasonrec.data_gen.schema import ROWS, Tables, write_dataset
from reasonrec.recipes import grow_catalogue
from reasonrec.recipes.index_items import IndexConfig
from reasonrec.recipes.keys import recorded
from reasonrec.tokenizers.artefact import read_manifest, staged, write_json
from reasonrec.tokenizers.index import build_index, save_quantizer
from reasonrec.tokenizers.quantizers.base import build_quantizer
from reasonrec.tokenizers.quantizers.kmeans import ResidualKMeans
from reasonrec.tokenizers.terminal import say

DIM, SIZES, SAMPLE, CENTRES = 384, [256, 256, 256], 20_000, 5000
LIMITS = {"adding": {"seconds": 10.0}, "indexing": {"seconds": 600.0, "peak_gb": 6.0}}


def vectors(n: int, seed: int) -> np.ndarray:
    """float32 (n, DIM) of unit length, around centres that all seeds share."""
    centres = np.random.default_rng(0).standard_normal((CENTRES, DIM), dtype=np.float32)
    random = np.random.default_rng([1, seed])
    rows = np.empty((n, DIM), dtype=np.float32)
    for start in range(0, n, 100_000):
        part = rows[start : start + 100_000]
        random.standard_normal(out=part, dtype=np.float32)
        part += centres[random.integers(0, CENTRES, len(part))]
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return rows


def table(first: int, n: int) -> pl.DataFrame:
    """Items with titles."""
    ids, numbers = [f"i{first + item}" for item in range(n)], pl.Series("item", range(n), dtype=pl.Int32)
    texts = {"title": [f"item {item}" for item in ids], "description": "", "category": "", "brand": ""}
    return pl.DataFrame({"item": numbers, "item_id": ids}).with_columns(
        *(
            pl.Series(name, text) if isinstance(text, list) else pl.lit(text).alias(name)
            for name, text in texts.items()
        )
    )


def make_dataset(folder: Path, n: int) -> None:
    """A dataset of so many items, with hardly any interaction."""
    facts = {
        "name": "drawn", "split": "leave_one_out", "mask_history": True, "order": "sequence", "repeats": False,
        "filters": [], "notes": [],
    }  # fmt: skip
    train = pl.DataFrame({"user": [0], "items": [[0, 1, 2]], "first_target": [1]})
    none = pl.DataFrame(schema=ROWS)
    users = pl.DataFrame({"user": [0], "user_id": ["u"]})
    with staged(folder, kind="dataset", config={}) as (work, found):
        found.update(write_dataset(work, Tables(table(0, n), users, train, none, none, facts)))


def make_index(folder: Path, dataset: Path, n: int) -> None:
    """An index whose codebooks know a sample."""
    rows = vectors(n, 0)
    quantizer = build_quantizer("plain", SIZES, 0, {"n_init": 1, "max_iter": 10})
    assert isinstance(quantizer, ResidualKMeans)
    quantizer.fit_encode(rows[:SAMPLE])
    made = IndexConfig(dataset=str(dataset), output_dir=str(folder), quantizer="plain", codebook_sizes=SIZES)
    inputs = {"dataset": read_manifest(dataset).hash}
    with staged(folder, kind="index", config=recorded(made, folder), inputs=inputs) as (work, _):
        build_index(quantizer.encode(rows), SIZES).save(work)
        save_quantizer(work, quantizer, rows)


class Clock:
    """Seconds, and seconds of CPU, of what is done under it."""

    def __enter__(self) -> None:
        self.start, self.before = time.perf_counter(), time.process_time()

    def __exit__(self, *error: object) -> None:
        self.seconds, self.cpu = time.perf_counter() - self.start, time.process_time() - self.before


def add(options: argparse.Namespace, clock: Clock) -> None:
    """The stage, with vectors in place of an encoder."""
    import torch  # noqa: F401 - as an encoder would have

    grow_catalogue.embed = lambda config, items, *rest: vectors(items.height, 1)  # type: ignore[assignment]
    words = ["--index", str(options.work / "index"), "--add_items", str(options.work / "new.csv")]
    sys.argv = ["grow_catalogue", *words, "--output_dir", str(options.work / "grown"), "--overwrite"]
    with clock:
        grow_catalogue.main()


def index(options: argparse.Namespace, clock: Clock) -> None:
    """The stage's quantizer and what makes its codes unique, on drawn vectors."""
    rows = vectors(options.items, 0)
    config = IndexConfig(
        dataset="", output_dir="", quantizer=options.quantizer, codebook_sizes=SIZES, unique=options.unique,
        quantizer_options=json.loads(options.quantizer_options),
    )  # fmt: skip
    with clock:
        found = build_index(config.build_quantizer().fit_encode(rows), SIZES)
    say(f"levels of {list(found.level_sizes)} codes")


def tell_error(rows: np.ndarray, found: np.ndarray) -> None:
    """Print the mean squared distance of vectors from what stands for them."""
    say(f"squared error {float(np.square(rows - found).sum(dtype=np.float64) / len(rows)):.4f}")


def own_level(options: argparse.Namespace, clock: Clock) -> None:
    """One level by the quantizer."""
    rows = vectors(options.items, 0)
    quantizer = build_quantizer(options.quantizer, SIZES[:1], 0, json.loads(options.quantizer_options))
    with clock:
        codes = quantizer.fit_encode(rows)
    tell_error(rows, quantizer.reconstruct(codes))


def faiss_level(options: argparse.Namespace, clock: Clock) -> None:
    """One level by faiss, with all vectors."""
    import faiss  # type: ignore[import-not-found]

    rows = vectors(options.items, 0)
    told = json.loads(options.quantizer_options)
    means = faiss.Kmeans(DIM, SIZES[0], niter=told.get("max_iter", 25), nredo=told.get("n_init", 1), seed=0,
                         max_points_per_centroid=told.get("rows_per_code") or len(rows))  # fmt: skip
    with clock:
        means.train(rows)
        _, codes = means.index.search(rows, 1)
    tell_error(rows, means.centroids[codes[:, 0]])


def make(options: argparse.Namespace, clock: Clock) -> None:
    """What is missing of dataset, index and new items."""
    with clock:
        if not (options.work / "dataset").is_dir():
            make_dataset(options.work / "dataset", options.items)
        if not (options.work / "index").is_dir():
            make_index(options.work / "index", options.work / "dataset", options.items)
        table(options.items, options.new).drop("item").write_csv(options.work / "new.csv")


PARTS = {"making": make, "adding": add, "indexing": index, "one level": own_level, "one level by faiss": faiss_level}


def measured(part: str, items: int) -> dict[str, float]:
    """Run a part of this file in a process of its own, and say what it took."""
    command = [sys.executable, __file__, *sys.argv[1:], "--part", part, "--items", str(items)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    *lines, last = done.stdout.splitlines()
    for line in lines:
        say(f"  {line}")
    found: dict[str, float] = json.loads(last)
    return found


def main() -> None:
    """Make, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--new", type=int, default=1000)
    parser.add_argument("--index", action="store_true", help="index all items, too")
    parser.add_argument("--quantizer", default="plain", choices=["plain", "balanced"])
    parser.add_argument("--unique", default="disambiguate", choices=["disambiguate", "reassign"])
    parser.add_argument(
        "--quantizer_options", default='{"n_init": 1, "max_iter": 25, "rows_per_code": 256}', help="JSON"
    )
    parser.add_argument("--part", choices=PARTS, help="do this one in this process, and print JSON")
    parser.add_argument("--work", type=Path, default=Path("runs/bench/large_catalogue"))
    parser.add_argument("--out", type=Path, default=Path("runs/bench/large_catalogue.json"))
    options = parser.parse_args()
    sizes, options.items = sorted(options.items), max(options.items)
    options.work /= str(options.items)  # what was made for another size stays there
    if options.part:
        PARTS[options.part](options, clock := Clock())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        print(json.dumps({"seconds": clock.seconds, "cpu": clock.cpu, "peak_gb": peak}))
        return
    options.work.mkdir(parents=True, exist_ok=True)
    machine = f"{os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[0]:.1f} at the start"
    say(machine)
    results: dict[str, Any] = {"machine": machine}
    parts = [(part, sizes[-1]) for part in ("making", "adding")]
    parts += [(part, n) for n in sizes for part in ("indexing", "one level", "one level by faiss") if options.index]
    for part, n in parts:
        try:
            found = results[f"{part} {n}"] = measured(part, n)
        except subprocess.CalledProcessError:
            say(f"{part} {n:,} is left out: it did not run")
            continue
        within = [
            f"{name} {'within' if found[name] <= most else 'ABOVE'} {most:g}"
            for name, most in LIMITS.get(part, {}).items()
        ]
        say(
            f"{part} {n:,}: {found['seconds']:.1f} s, {found['cpu']:.1f} s of CPU, {found['peak_gb']:.2f} GB at most"
            + "".join(f"; {words}" for words in within)
        )
    write_json(options.out, results)


if __name__ == "__main__":
    main()
