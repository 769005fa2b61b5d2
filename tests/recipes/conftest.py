"""Launching stages as a user does, and one trained adapter that the tests of several stages share."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser, expect, sync_playwright

RECIPES = Path(__file__).parents[2] / "recipes"
# Runs a stage that is killed right behind a checkpoint: by itself, so that no test has to be quick enough to do it.
_KILLED = """
import os, runpy, signal, sys
from transformers import Trainer

save, step = Trainer._save_checkpoint, int(sys.argv.pop(1))

def save_and_die(trainer, *args, **kwargs):
    save(trainer, *args, **kwargs)
    if trainer.state.global_step >= step:
        os.kill(os.getpid(), signal.SIGKILL)

Trainer._save_checkpoint = save_and_die
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
Stage = Callable[..., subprocess.CompletedProcess[str]]
HANGS = 1800  # seconds; two processes that wait for each other would wait for ever


@pytest.fixture(scope="session")
def torchrun() -> Stage:
    """A function that runs a script in several processes of one launch, two unless told otherwise."""

    def launch(
        *command: str | Path, processes: int = 2, check: bool = True, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        process = subprocess.Popen(
            [*launcher, *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that it is killed with its children
            env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", **environment},
        )
        try:
            out, error = process.communicate(timeout=HANGS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        assert not check or process.returncode == 0, out[-2000:] + error[-9000:]
        return subprocess.CompletedProcess(launcher, process.returncode, out, error)

    return launch


@pytest.fixture(scope="session")
def killed_behind() -> Callable[..., None]:
    """A function that runs `recipes/<name>.py` with flags until it has written the checkpoint of a step."""

    def launch(step: int, name: str, *flags: str) -> None:
        command = [sys.executable, "-c", _KILLED, str(step), str(RECIPES / f"{name}.py"), *flags]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == -signal.SIGKILL, done.stdout[-2000:] + done.stderr[-4000:]

    return launch


@pytest.fixture(scope="session")
def stage_on_two(torchrun: Stage) -> Stage:
    """A function that launches `recipes/<name>.py` with flags in two processes."""
    return lambda name, *flags: torchrun(RECIPES / f"{name}.py", *flags)


@pytest.fixture
def refused_by(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., str]:
    """A function that runs a stage in this process with what it has to refuse; gives the one line that says why."""
    from reasonrec.recipes.args import run

    def run_stage(name: str, *words: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *words, "--output_dir", str(tmp_path / "out")])
        with pytest.raises(SystemExit) as stopped:
            run(importlib.import_module(f"reasonrec.recipes.{name}").main)()
        assert stopped.value.code == 2
        assert not (tmp_path / "out").exists()
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
        return line

    return run_stage


@pytest.fixture(scope="session")
def set_index(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of `tiny_dataset` with unique codes: 4 × 4 × 4."""
    from reasonrec.data_gen.schema import Dataset
    from reasonrec.tokenizers.artefact import staged
    from reasonrec.tokenizers.index import build_index

    dataset = Dataset.load(tiny_dataset)
    every = np.stack(np.meshgrid(*[np.arange(4)] * 3, indexing="ij"), -1).reshape(-1, 3)
    made = build_index(np.random.default_rng(0).permutation(every)[: dataset.n_items], [4, 4, 4])
    out = tmp_path_factory.mktemp("set_index") / "index"
    with staged(out, kind="index", config={}, inputs={"dataset": dataset.manifest.hash}) as (folder, _):
        made.save(folder)
    return out


@pytest.fixture(scope="session")
def sft_flags(tiny_base: Path, tiny_dataset: Path, tiny_index: Path) -> list[str]:
    """What every training on the tiny world needs."""
    return ["--dataset", str(tiny_dataset), "--index", str(tiny_index), "--model", str(tiny_base)]


@pytest.fixture(scope="session")
def lora_flags() -> list[str]:
    """LoRA with everything that draws random numbers: dropout, three tasks, two passes."""
    return [
        *("--method", "lora", "--lora_dropout", "0.1", "--lora_r", "4", "--max_history", "6", "--seed", "3"),
        *("--tasks", "{seqrec: 1, item2index: 0.3, fusionseqrec: 0.2}", "--num_train_epochs", "2"),
        *("--per_device_train_batch_size", "16", "--learning_rate", "5e-3", "--row_learning_rate", "1e-2"),
        *("--bf16", "false", "--activation_checkpointing", "false", "--save_steps", "5"),
    ]


@pytest.fixture(scope="session")
def adapter(
    stage: Stage, sft_flags: list[str], lora_flags: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A LoRA adapter that `recipes/sft.py` trained on the tiny world without an interruption."""
    out = tmp_path_factory.mktemp("adapter") / "lora"
    stage("sft", *sft_flags, *lora_flags, "--output_dir", str(out))
    return out


@pytest.fixture(scope="session")
def point(edit_manifest: Callable[..., None]) -> Callable[[Path, str], None]:
    """A function that lets a trained model say that it was trained on another base."""

    def edit(folder: Path, base: str) -> None:
        edit_manifest(folder, lambda manifest: manifest.config.update(base_model=base))
        edit_manifest(folder, lambda manifest: manifest.facts["setting"].update(base_model=base))

    return edit


@pytest.fixture(scope="session")
def other_world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dataset and an index that fit each other, and nothing else here."""
    from reasonrec.data_gen.readers.synthetic import WorldConfig, make_synthetic
    from reasonrec.data_gen.schema import Dataset, write_dataset
    from reasonrec.tokenizers.artefact import staged
    from reasonrec.tokenizers.index import build_index

    folder = tmp_path_factory.mktemp("other_world")
    world = WorldConfig(seed=1, clusters=4, items_per_cluster=12, personas=2, shift=1)
    with staged(folder / "dataset", kind="dataset", config={}) as (work, facts):
        facts.update(write_dataset(work, make_synthetic(world, train_users=20, held_out_users=5)))
    dataset = Dataset.load(folder / "dataset")
    codes = np.stack(np.divmod(np.arange(dataset.n_items), 12), axis=1)
    inputs = {"dataset": dataset.manifest.hash}
    with staged(folder / "index", kind="index", config={}, inputs=inputs) as (work, _):
        build_index(codes, [4, 12]).save(work)
    return folder / "dataset", folder / "index"


@pytest.fixture(scope="session")
def later_version() -> Callable[..., Path]:
    """A function that writes a catalogue artefact with more items, at drawn places, than another."""
    from dataclasses import replace

    import polars as pl

    from reasonrec.tokenizers.artefact import staged
    from reasonrec.tokenizers.catalogue import Catalogue
    from reasonrec.tokenizers.grow import grown_index, place_items

    def make(catalogue: Catalogue, out: Path, *, new: int, retired: list[int] | None = None) -> Path:
        """A catalogue with more items at drawn places."""
        random = np.random.default_rng(0)
        books = [random.normal(size=(size, 3)).astype(np.float32) for size in catalogue.codes.level_sizes[:-1]]
        placed = place_items(catalogue.codes, books, random.normal(size=(new, 3)).astype(np.float32))
        added = pl.DataFrame(
            [{"item_id": f"new-{n}", "title": f"new item {n}"} for n in range(new)],
            schema={"item_id": pl.String, "title": pl.String},
        )
        items = pl.concat([catalogue.items, added], how="diagonal").with_columns(
            pl.col(pl.String).fill_null(""), pl.col("train_count").fill_null(0)
        )
        gone = np.array(retired or [], dtype=np.int64)
        grown = replace(catalogue, items=items, index=grown_index(catalogue.codes, placed.codes), retired=gone)
        with staged(out, kind="catalogue", config={}, overwrite=True) as (folder, facts):
            facts.update(grown.save(folder))
            for name in ("quantizer", "embeddings"):
                (folder / f"{name}.safetensors").write_bytes(b"")  # nobody who recommends reads them
        return out

    return make


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """The machine's own Chromium (Debian: `apt-get install chromium`); `CHROMIUM` names another."""
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None and not os.environ.get("CI"):
        pytest.skip("no Chromium on this machine")
    flags = ["--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    expect.set_options(timeout=120_000)  # a busy machine is no failure
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", *flags])
        yield running
        running.close()
