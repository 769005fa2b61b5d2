"""What all tests share: nothing is downloaded, one thread, one seed, and a world small enough to train on.

`tiny_base` is a real (if silly) language model, `tiny_dataset` and `tiny_index` the artefacts that a stage would have
written. All of them are made once a session and shared: a test that changes a file has to work on a copy.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

RECIPES = Path(__file__).parents[1] / "recipes"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SENTENCES = (
    "History: Item named small oak lamp: Which item is this?",
    "What is the name of the next item? Name of the next item:",
    "Chosen so far, oldest first: classic steel kettle, large velvet backpack, deluxe glass headphones. Next:",
    "Give the name of the item. These were chosen; the next one is called a bamboo novel, then copper sneakers.",
    "Someone went from linen guitar and marble tent to a deluxe puzzle, a scarf, a drill and a camera.",
)


def pytest_configure() -> None:
    """Set what libraries read when they are imported; nothing that reads it is imported above."""
    fixed = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "ACCELERATE_USE_CPU": "1",
        "MPLBACKEND": "agg",
    }
    os.environ.update(fixed)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "POLARS_MAX_THREADS"):
        os.environ.setdefault(name, "1")
    from reasonrec.tokenizers.environment import wait_passively

    # The same examples every time; HYPOTHESIS_PROFILE=default looks for new ones.
    settings.register_profile("same", derandomize=True, deadline=None)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))
    wait_passively()  # threads that spin at barriers starve the other workers
    # What a launcher or a user left behind would turn tests into something else.
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "REASONREC_TRACEBACK"):
        os.environ.pop(name, None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that no worker is left alone with one of them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def _same_seed() -> None:
    """Every test draws the same numbers, whatever ran before it."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries still draw from the global state
    torch.manual_seed(0)


@pytest.fixture
def expanded_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """4-bit weights stay 4 bit, as on a GPU, or on a CPU whose memory is too small to expand them once."""
    from reasonrec.recipes.models import quantized

    monkeypatch.setattr(quantized, "free_memory", lambda: 0)


@pytest.fixture(scope="session")
def stage() -> Callable[..., subprocess.CompletedProcess[str]]:
    """A function that launches `recipes/<name>.py` with flags in a process of its own and expects it to end well."""

    def launch(name: str, *flags: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(RECIPES / f"{name}.py"), *flags]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == status, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return launch


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with tied embeddings and a byte-level BPE tokenizer, in the form of a Hub checkout.

    Returns:
        The folder, for `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny_base")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset artefact: 48 items in 4 clusters, 120 users to train on, 30 cases each in validation and test."""
    from reasonrec.data_gen.readers.synthetic import WorldConfig, make_synthetic
    from reasonrec.data_gen.schema import write_dataset
    from reasonrec.tokenizers.artefact import staged

    out = tmp_path_factory.mktemp("tiny_dataset") / "dataset"
    world = WorldConfig(seed=0, clusters=4, items_per_cluster=12, personas=2, shift=1)
    with staged(out, kind="dataset", config={"source": "synthetic"}) as (folder, facts):
        facts.update(write_dataset(folder, make_synthetic(world, train_users=120, held_out_users=30)))
    return out


@pytest.fixture(scope="session")
def tiny_index(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index artefact of `tiny_dataset` with drawn codes: 4 × 6, most items with a disambiguation code."""
    import numpy as np

    from reasonrec.data_gen.schema import Dataset
    from reasonrec.tokenizers.artefact import staged
    from reasonrec.tokenizers.index import build_index

    dataset = Dataset.load(tiny_dataset)
    codes = np.random.default_rng(0).integers([4, 6], size=(dataset.n_items, 2))
    index = build_index(codes, [4, 6])
    assert 0 < (index.codes[:, -1] >= 0).sum() < index.n_items, "both kinds of items belong into the tests"
    out = tmp_path_factory.mktemp("tiny_index") / "index"
    with staged(out, kind="index", config={}, inputs={"dataset": dataset.manifest.hash}) as (folder, _):
        index.save(folder)
    return out


@pytest.fixture(scope="session")
def edit_manifest() -> Callable[..., None]:
    """A function that changes an artefact's manifest as its author could have, hashes included."""
    from reasonrec.tokenizers.artefact import read_manifest, write_json
    from reasonrec.tokenizers.output import MANIFEST

    def edit(folder: Path, change: Callable[[Any], object]) -> None:
        manifest = read_manifest(folder)
        change(manifest)
        manifest.hash_again()
        write_json(folder / MANIFEST, manifest.__dict__)

    return edit
