"""A server under load: throughput, latency, memory, and what a stranger's requests do to it.

python tests/benchmarks/serving.py --model runs/demo/published

Starts `recipes/serve.py` as its own process on this machine and asks it, over loopback and from as many threads as
there are clients, for ten items behind histories of 1 to 30 random items:

- start: from starting a process to the first list, in Python and of the server; and `reasonrec recommend --help`.
- alone: one client after the other; together: 16 clients at once. Their throughput is compared.
- returning: a user who asks the same again, and one with another history, in turn.
- crowd: 64 clients and 48 slots, so that some are refused; the server's memory in its second and last minute.
- hang-ups: chains that are begun and left; how many tokens the server wrote before each slot was free again.
- strangers: requests drawn from the server's own schema (schemathesis), none of which may be answered by 5xx. They are
  to find what HTTP, the checks and the engine let through, so the first layer of the LLM, trained for one step on the
  demo's data set, answers them: ten thousand would wait an hour for all of it.

Writes `runs/bench/serving.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import schemathesis
import torch
from hypothesis import HealthCheck, Phase, given, settings

from reasonrec.recipes.models.checkpoint import trained_manifest
from reasonrec.tokenizers.artefact import write_json
from reasonrec.tokenizers.catalogue import Catalogue

PARTS = ["start", "together", "crowd", "hang_ups", "strangers"]
RECIPES = Path(__file__).parents[2] / "recipes"


class Server:
    """`recipes/serve.py` on a free port, until the block ends."""

    def __init__(self, model: str, *flags: str) -> None:
        words = [sys.executable, str(RECIPES / "serve.py"), "--model", model, "--port", "0", *flags]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("serving "):
                self.url = line.split(" on ")[1].split(" ")[0]
                return
        raise SystemExit(f"the server did not start: {' '.join(words)}")

    def memory(self) -> int:
        """Resident bytes."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()


def timed(*command: str) -> float:
    """Seconds that a process takes."""
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return round(time.perf_counter() - began, 2)


def load(server: Server, ids: list[str], clients: int, seconds: float) -> dict[str, Any]:
    """Clients that ask one question after the other; each sees its own answers, all statuses are counted."""
    statuses: Counter[int | str] = Counter()
    times: list[float] = []
    lock, end = threading.Lock(), time.monotonic() + seconds

    def client(number: int) -> None:
        rng = np.random.default_rng(number)
        with httpx.Client(timeout=120) as http:
            while time.monotonic() < end:
                history = [ids[i] for i in rng.integers(0, len(ids), rng.integers(1, 31))]
                began = time.perf_counter()
                try:
                    status: int | str = http.post(f"{server.url}/v1/recommend", json={"history": history}).status_code
                except httpx.HTTPError as error:
                    status = type(error).__name__
                took = time.perf_counter() - began
                with lock:
                    statuses[status] += 1
                    if status == 200:
                        times.append(took)
                if status == 429:
                    time.sleep(0.2)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    began = time.monotonic()
    memory = []
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(1.0)
        memory.append((time.monotonic() - began, server.memory()))
    took = time.monotonic() - began

    def mean_memory(first: float, last: float) -> float:
        return float(np.mean([used for at, used in memory if first <= at < last] or [np.nan]))

    return {
        "clients": clients,
        "seconds": round(took, 1),
        "statuses": {str(status): count for status, count in statuses.items()},
        "answers_per_second": round(len(times) / took, 2),
        "p50_ms": round(float(np.percentile(times, 50)) * 1000),
        "p95_ms": round(float(np.percentile(times, 95)) * 1000),
        "memory_mib": round(server.memory() / 2**20),
        "memory_last_minute_to_second": round(mean_memory(took - 60, took) / mean_memory(60, 120), 4),
    }


def hang_ups(server: Server, ids: list[str], tries: int) -> dict[str, Any]:
    """Begin chains and leave them; who asks next on the only slot tells how long it was taken."""
    waited = []
    for number in range(tries):
        question = {"history": [ids[number % len(ids)]], "mode": "reasoning", "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/recommend", json=question, timeout=60) as answer:
            lines = (line for line in answer.iter_lines() if line.startswith("event"))
            assert next(lines) == "event: thought"
            began = time.perf_counter()
            next(lines)
            step = time.perf_counter() - began
        left = time.perf_counter()
        while "reasonrec_users_open 0.0" not in httpx.get(f"{server.url}/metrics", timeout=120).text:
            time.sleep(step / 20)  # asking takes the server's time as well
        waited.append((time.perf_counter() - left) / step)
    return {"tries": tries, "slot_free_after_steps": {"p50": float(np.median(waited)), "most": float(max(waited))}}


def returning(server: Server, ids: list[str], tries: int) -> dict[str, Any]:
    """Milliseconds of a history that the server was asked about just before, beside those of a new one."""
    rng = np.random.default_rng(0)
    took: dict[str, list[float]] = {"new": [], "again": []}
    with httpx.Client(timeout=120) as http:
        for _ in range(tries):
            history = [ids[i] for i in rng.integers(0, len(ids), 15)]
            for kind in took:
                began = time.perf_counter()
                http.post(f"{server.url}/v1/recommend", json={"history": history}).raise_for_status()
                took[kind].append((time.perf_counter() - began) * 1000)
    return {f"{kind}_p50_ms": round(float(np.median(times)), 1) for kind, times in took.items()}


def first_layer() -> str:
    """A model that answers quickly and has learned nothing."""
    out = "runs/bench/first_layer"
    if not (Path(out) / "manifest.json").is_file():
        config = RECIPES / "configs" / "demo" / "sft.yaml"
        flags = ["--layers", "1", "--num_train_epochs", "0.001", "--output_dir", out]
        subprocess.run([sys.executable, str(RECIPES / "sft.py"), "--config", str(config), *flags], check=True)
    return out


def strangers(server: Server, requests: int) -> dict[str, Any]:
    """Requests from the schema, right and wrong ones, for every path."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    asked = [found for found in operations if list(found.iter_parameters()) or list(found.body)]  # others take nothing
    statuses: Counter[int] = Counter()
    modes = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
    for operation in asked:
        for mode in modes:

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(
                max_examples=-(-requests // (len(asked) * len(modes))), deadline=None, database=None,
                phases=[Phase.generate], suppress_health_check=list(HealthCheck), derandomize=True,
            )  # fmt: skip
            def ask(case: Any) -> None:
                statuses[case.call().status_code] += 1

            ask()
    wrong = sum(count for status, count in statuses.items() if status >= 500)
    return {
        "requests": sum(statuses.values()),
        "statuses": {str(s): n for s, n in sorted(statuses.items())},
        "5xx": wrong,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/demo/published")
    parser.add_argument("--out", default="runs/bench/serving.json")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seconds", type=float, default=60.0, help="alone, and together")
    parser.add_argument("--crowd_seconds", type=float, default=300.0)
    parser.add_argument("--requests", type=int, default=10_000, help="of strangers")
    options = parser.parse_args()
    if not (Path(options.model) / "manifest.json").is_file():
        raise SystemExit(f"{options.model} is not there: `make demo` makes it, or name another --model")
    ids = Catalogue.load(Path(options.model), trained_manifest(Path(options.model)).facts).item_ids
    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "model": options.model,
    }

    def done(name: str, found: Any) -> None:
        result[name] = found
        print(f"{name}: {json.dumps(found)}", flush=True)
        write_json(Path(options.out), result)

    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    if "start" in options.parts:
        first = (
            "import sys; from reasonrec.recipes.recommender import Recommender; "
            f"Recommender.from_pretrained(sys.argv[1]).recommend({ids[:5]!r})"
        )
        done("seconds_to_first_list_in_python", timed(sys.executable, "-c", first, options.model))
        done("seconds_of_help", timed(str(Path(sys.executable).with_name("reasonrec")), "recommend", "--help"))
    if "together" in options.parts:
        began = time.perf_counter()
        with Server(options.model, "--capacity", "64") as server:
            httpx.post(f"{server.url}/v1/recommend", json={"history": ids[:5]}, timeout=120).raise_for_status()
            done("seconds_to_first_list", round(time.perf_counter() - began, 1))
            done("alone", load(server, ids, 1, options.seconds))
            done("together", load(server, ids, 16, options.seconds))
            ratio = result["together"]["answers_per_second"] / result["alone"]["answers_per_second"]
            done("together_to_alone", round(ratio, 2))
            done("returning", returning(server, ids, 20))
    if "crowd" in options.parts:
        with Server(options.model, "--capacity", "48") as server:
            done("crowd", load(server, ids, 64, options.crowd_seconds))
    if "hang_ups" in options.parts:
        with Server(options.model, "--capacity", "1", "--unproven", "true") as server:
            done("hang_ups", hang_ups(server, ids, 20))
    if "strangers" in options.parts:
        with Server(first_layer()) as server:
            done("strangers", strangers(server, options.requests))


if __name__ == "__main__":
    main()
