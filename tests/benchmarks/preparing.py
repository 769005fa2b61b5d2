"""How long `prepare` takes, and how much memory, for logs of a few sizes.

python tests/benchmarks/preparing.py --rows 2000000 20000000
python tests/benchmarks/preparing.py --source atomic --rows 2000000 8000000    # or amazon, movielens

Draws a log of invented interactions (items by Zipf's law, seeded) and its item table as CSV files, and runs the stage
in a process of its own, whose peak memory is read. With --source the same log is written as a public data set is, and
read as one. RecBole's loader reads the smallest log beside it, with the same
filter, where it runs (1.2.1 needs an older NumPy than this kit). Both run one after the other on this machine; what
else runs there slows both.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from reasonrec.tokenizers.artefact import write_json
from reasonrec.tokenizers.terminal import say

STAGE = Path(__file__).parents[2] / "recipes" / "prepare.py"
BLOCK = 1_000_000  # rows that are drawn at once


def draw(folder: Path, rows: int, n_items: int, seed: int) -> tuple[Path, Path]:
    """Write `rows` interactions of `rows / 20` users with `n_items` items, in the order of no user; and the items."""
    log, table = folder / f"log_{rows}.csv", folder / f"items_{n_items}.csv"
    if not table.is_file():
        words = np.random.default_rng(seed).integers(0, 5000, (n_items, 6))
        titles = [" ".join(f"word{word}" for word in row) for row in words]
        pl.DataFrame({"item_id": [f"i{n}" for n in range(n_items)], "title": titles}).write_csv(table)
    if not log.is_file():
        draws = np.random.default_rng([seed, rows])
        popular = np.cumsum(1 / np.arange(1, n_items + 1))
        part = log.with_suffix(".part")
        with part.open("wb") as file:
            for start in range(0, rows, BLOCK):
                n = min(BLOCK, rows - start)
                users = draws.integers(0, rows // 20, n)
                items = np.searchsorted(popular, draws.random(n) * popular[-1])
                times = draws.integers(1_600_000_000, 1_700_000_000, n)
                frame = pl.DataFrame({"user_id": users, "item_id": items, "timestamp": times})
                frame = frame.with_columns(pl.format("u{}", "user_id"), pl.format("i{}", "item_id"))
                frame.select("user_id", "item_id", "timestamp").write_csv(file, include_header=start == 0)
        part.rename(log)
    return log, table


def published(log: Path, items: Path, source: str) -> Path:
    """The folder of the same log in the files of a public data set, every rating a 5."""
    folder = log.parent / f"{source}_{log.stem}"
    if folder.is_dir():
        return folder
    part = folder.with_suffix(".part")
    part.mkdir(exist_ok=True)
    rows, titles = pl.scan_csv(log), pl.scan_csv(items)
    if source == "atomic":
        kinds = {"user_id": "token", "item_id": "token", "timestamp": "float", "title": "token_seq"}
        for table, name in ((rows, "drawn.inter"), (titles, "drawn.item")):
            names = {name: f"{name}:{kinds[name]}" for name in table.collect_schema()}
            table.rename(names).sink_csv(part / name, separator="\t")
    elif source == "movielens":
        rows.select(userId="user_id", movieId="item_id", rating=pl.lit("5.0"), timestamp="timestamp").sink_csv(
            part / "ratings.csv"
        )
        titles.select(movieId="item_id", title="title", genres=pl.lit("Drama")).sink_csv(part / "movies.csv")
    else:
        rows.select(
            "user_id", pl.lit(5.0).alias("rating"), parent_asin="item_id", timestamp=pl.col("timestamp") * 1000,
            text=pl.lit("as described"),
        ).sink_ndjson(part / "drawn.jsonl")  # fmt: skip
        titles.select("title", parent_asin="item_id").sink_ndjson(part / "meta_drawn.jsonl")
    part.rename(folder)
    return folder


def measured(command: list[str]) -> dict[str, float]:
    """Run a command: seconds, seconds of CPU (which other work lengthens less), and GB of peak memory."""
    # A process of its own that runs nothing else, for the system adds up all children.
    code = (
        "import json, resource, subprocess, sys; done = subprocess.run(sys.argv[1:], stdout=sys.stderr); "
        "used = resource.getrusage(resource.RUSAGE_CHILDREN); "
        "print(json.dumps([used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / 1e9])); sys.exit(done.returncode)"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ChildProcessError(done.stderr.strip().splitlines()[-1])
    cpu, peak = json.loads(done.stdout)
    return {"seconds": time.perf_counter() - start, "cpu": cpu, "peak_gb": peak}


def recbole(log: Path) -> dict[str, float] | str:
    """The same for RecBole's loader, or why it cannot be measured."""
    atomic = log.parent / "atomic" / f"log{log.stem}.inter"
    atomic.parent.mkdir(exist_ok=True)
    names = {"user_id": "user_id:token", "item_id": "item_id:token", "timestamp": "timestamp:float"}
    pl.scan_csv(log).rename(names).sink_csv(atomic, separator="\t")
    told = {
        "data_path": str(atomic.parent), "load_col": {"inter": list(names)}, "show_progress": False,
        "user_inter_num_interval": "[5,inf)", "item_inter_num_interval": "[5,inf)",
        "filter_inter_by_user_or_item": True,
    }  # fmt: skip
    folder = atomic.parent / atomic.stem
    folder.mkdir(exist_ok=True)
    atomic.replace(folder / atomic.name)
    code = (
        "from recbole.config import Config; from recbole.data import create_dataset; "
        f"create_dataset(Config('Pop', {atomic.stem!r}, config_dict={told!r})).build()"
    )
    try:
        return measured([sys.executable, "-c", code])
    except ChildProcessError as error:
        return str(error)


def main() -> None:
    """Draw, prepare, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[2_000_000])
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--source", default="tables", choices=["tables", "amazon", "atomic", "movielens"])
    parser.add_argument("--work", type=Path, default=Path("runs/bench/preparing"))
    parser.add_argument("--out", type=Path, default=Path("runs/bench/preparing.json"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    processor = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    load = os.getloadavg()[0]
    machine = f"{os.cpu_count()} cores, {processor}, polars {pl.__version__}, load {load:.1f} at the start"
    say(machine)
    results: dict[str, Any] = {"machine": machine}
    for rows in sorted(options.rows):
        log, items = draw(options.work, rows, options.items, options.seed)
        told = {
            "source": options.source, "user_k": "5", "item_k": "5", "mask_history": "true",
            "output_dir": str(options.work / f"dataset_{rows}"), "overwrite": "true",
        }  # fmt: skip
        if options.source == "tables":
            told |= {"interactions": str(log), "items": str(items)}
        else:
            told["path"] = str(published(log, items, options.source))
        flags = [word for name, value in told.items() for word in (f"--{name}", value)]
        results[f"{rows}"] = report(f"{rows:,} rows", measured([sys.executable, str(STAGE), *flags]))
    first, last = (results[f"{rows}"] for rows in (min(options.rows), max(options.rows)))
    times = max(options.rows) / min(options.rows)
    results["growth"] = {name: last[name] / first[name] for name in first}
    grown = ", ".join(f"{value:.1f} times {name}" for name, value in results["growth"].items())
    say(f"{times:.0f} times the rows: {grown}")
    beside = recbole(options.work / f"log_{min(options.rows)}.csv")
    if isinstance(beside, str):
        say(f"RecBole is left out: {beside}")
    else:
        report(f"RecBole, {min(options.rows):,} rows", beside)
        say("ratio: " + ", ".join(f"{beside[name] / first[name]:.2f} {name}" for name in first))
    results["recbole"] = beside
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, results)


def report(name: str, found: dict[str, float]) -> dict[str, float]:
    """Print one measurement, and return it."""
    say(f"{name:<28}{found['seconds']:>8.1f} s{found['cpu']:>8.1f} s of CPU{found['peak_gb']:>7.2f} GB at most")
    return found


def _lines(file: str) -> list[str]:
    return Path(file).read_text(encoding="utf-8").splitlines() if Path(file).is_file() else []


if __name__ == "__main__":
    main()
