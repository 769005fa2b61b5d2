"""The SFT stage as a user launches it: what it leaves, what a kill costs, what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from reasonrec.data_gen.schema import Dataset
from reasonrec.recipes import sft
from reasonrec.recipes.trainers.resume import last_checkpoint
from reasonrec.tokenizers.artefact import read_manifest
from reasonrec.tokenizers.output import resume_folder

SFT = Path(sft.__file__)
Stage = Callable[..., subprocess.CompletedProcess[str]]
ADAPTER_FILES = {
    "README.md", "adapter_config.json", "adapter_model.safetensors", "catalogue.parquet", "chat_template.jinja",
    "index.safetensors", "logs", "manifest.json",
    "tokenizer.json", "tokenizer_config.json", "train_metrics.json",
}  # fmt: skip
MODEL_FILES = ADAPTER_FILES - {"adapter_config.json", "adapter_model.safetensors"}
MODEL_FILES |= {"config.json", "generation_config.json", "model.safetensors"}


def here(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    """Run the stage in this process, without TensorBoard: as the launched one, only quicker."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")  # so that it is put back
    monkeypatch.setattr(sys, "argv", [str(SFT), *flags, "--report_to", "none", "--disable_tqdm", "true"])
    sft.run(sft.main)()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.glob("*model.safetensors")
    return load_file(path)


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def check_folder(out: Path, kind: str, method: str, sft_flags: list[str]) -> dict[str, Any]:
    """What every trained folder promises; returns its train_metrics.json."""
    assert not resume_folder(out).exists()
    assert {path.name for path in out.iterdir()} == (MODEL_FILES if kind == "model" else ADAPTER_FILES)
    (events,) = (out / "logs").iterdir()
    assert events.name.startswith("events.out.tfevents")
    assert events.stat().st_size > 200
    manifest = read_manifest(out, kind)
    assert manifest.inputs == {
        "dataset": read_manifest(sft_flags[1]).hash,
        "index": read_manifest(sft_flags[3]).hash,
    }
    assert manifest.facts["setting"]["method"] == method == manifest.config["method"]
    assert re.fullmatch("v2_[0-9a-f]{64}", manifest.facts["setting"]["fingerprint"])
    assert not any("token" in key for key in manifest.config), "no credential may reach an artefact"
    record = json.loads((out / "train_metrics.json").read_text())
    losses = [entry["loss"] for entry in record["log"] if "loss" in entry]
    assert losses[-1] < losses[0]
    assert record["train"]["train_loss"] > 0
    return record


# --- (a) end to end ---------------------------------------------------------------------------------------------


def test_full_fine_tuning(stage: Stage, sft_flags: list[str], tiny_base: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "full"
    flags = ["--method", "full", "--learning_rate", "2e-3", "--valid_rows", "20", "--bf16", "false"]
    printed = stage(
        "sft", *sft_flags, *flags, "--eval_strategy", "steps", "--eval_steps", "20", "--output_dir", str(out)
    ).stdout
    record = check_folder(out, "model", "full", sft_flags)
    assert len([entry for entry in record["log"] if "eval_loss" in entry]) == 3, "steps 20 and 40, and the end"
    tensors, before = weights(out), weights(tiny_base)
    rows = read_manifest(out).facts["rows"]
    assert tensors["model.embed_tokens.weight"].shape == (rows, 64)
    assert "lm_head.weight" not in tensors, "a tied head is saved once"
    assert not torch.equal(tensors["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"])
    assert f"{out} holds the model" in printed


def test_lora(adapter: Path, sft_flags: list[str]) -> None:
    check_folder(adapter, "adapter", "lora", sft_flags)
    check_only_lora_and_rows(adapter, rank=4)


def test_qlora_with_the_defaults(stage: Stage, sft_flags: list[str], tmp_path: Path) -> None:
    stage("sft", *sft_flags, "--learning_rate", "2e-3", "--output_dir", str(tmp_path / "qlora"))
    check_folder(tmp_path / "qlora", "adapter", "qlora", sft_flags)
    check_only_lora_and_rows(tmp_path / "qlora", rank=16)


def check_only_lora_and_rows(out: Path, rank: int) -> None:
    """An adapter holds LoRA of all linear layers and the new rows, in float32 and trained, and nothing else."""
    tensors = weights(out)
    lora = {name: tensor for name, tensor in tensors.items() if ".lora_" in name}
    ((name, rows),) = ((name, tensor) for name, tensor in tensors.items() if name not in lora)
    assert name.endswith("embed_tokens.token_adapter.trainable_tokens_delta")
    assert rows.shape == (17, 64), "begin marker, 4 + 6 codes, 6 disambiguation codes"
    assert len(lora) == 2 * 7 * 2, "A and B of seven linear layers in two blocks"
    assert {rank} == {tensor.shape[0 if ".lora_A." in name else 1] for name, tensor in lora.items()}
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert all(tensor.any() for tensor in lora.values()), "B starts at zero and has to move"
    assert (out / "adapter_model.safetensors").stat().st_size < 150_000, "no embedding matrices on top"


# --- (b), (c), (d) a kill and what follows ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(
    sft_flags: list[str],
    lora_flags: list[str],
    tmp_path_factory: pytest.TempPathFactory,
    killed_behind: Callable[..., None],
) -> tuple[Path, list[str]]:
    """What a run killed behind its second checkpoint left; and its flags."""
    out = tmp_path_factory.mktemp("killed") / "lora"
    flags = [*sft_flags, *lora_flags, "--output_dir", str(out)]
    work = resume_folder(out)
    killed_behind(10, "sft", *flags)
    assert not out.exists(), "an unfinished artefact must not carry its name"
    assert last_checkpoint(work) == work / "checkpoint-10"
    kept = out.with_name("kept")
    work.rename(kept)
    return out, flags


@pytest.fixture
def left(killed: tuple[Path, list[str]]) -> tuple[Path, list[str]]:
    """The partial folder as the kill left it, in its place; and the flags."""
    out, flags = killed
    work = resume_folder(out)
    for folder in (out, work):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(out.with_name("kept"), work)
    return out, flags


def test_checkpoints_hold_the_adapter_and_no_more(killed: tuple[Path, list[str]]) -> None:
    for step in (5, 10):
        folder = killed[0].with_name("kept") / f"checkpoint-{step}"
        assert {path.name for path in folder.iterdir()} == {
            "README.md", "adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "rng_state.pth",
            "scheduler.pt", "trainer_state.json",
        }  # fmt: skip
        assert (folder / "adapter_model.safetensors").stat().st_size < 50_000


def test_a_killed_run_goes_on_to_the_same_bits(stage: Stage, left: tuple[Path, list[str]], adapter: Path) -> None:
    out, flags = left
    printed = stage("sft", *flags).stdout
    assert f"going on from {resume_folder(out) / 'checkpoint-10'}" in printed
    assert same_bits(weights(out), weights(adapter))
    assert {path.name for path in out.iterdir()} == ADAPTER_FILES, "no resume state stays"
    logs = [json.loads((folder / "train_metrics.json").read_text())["log"] for folder in (out, adapter)]
    for log in logs:
        for line in log:
            line.pop("train_runtime", None)
    assert logs[0] == logs[1], "losses, tokens and all, of the whole run"
    assert (out / "README.md").read_text() == (adapter / "README.md").read_text()


@pytest.mark.parametrize("harm", ["missing", "truncated"])
def test_a_torn_checkpoint_is_skipped(
    left: tuple[Path, list[str]],
    adapter: Path,
    harm: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, flags = left
    torn = resume_folder(out) / "checkpoint-10"
    state = torn / "trainer_state.json"
    if harm == "missing":  # killed while it was written: the state comes last
        state.unlink()
        (torn / "optimizer.pt").write_bytes(b"")
    else:
        state.write_bytes(state.read_bytes()[:100])
    here(monkeypatch, *flags, "--logging_steps", "7")  # this may change between the two
    assert f"going on from {resume_folder(out) / 'checkpoint-5'}" in capsys.readouterr().out
    assert same_bits(weights(out), weights(adapter))


def test_other_settings_start_anew(
    left: tuple[Path, list[str]],
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, flags = left
    here(monkeypatch, *flags, "--lora_alpha", "8")
    printed = capsys.readouterr().out
    assert f"{resume_folder(out)} was begun with other settings (lora_alpha): starting anew" in printed
    assert "going on" not in printed
    here(monkeypatch, *flags, "--lora_alpha", "8", "--output_dir", str(tmp_path / "fresh"))
    assert "other settings" not in capsys.readouterr().out
    assert same_bits(weights(out), weights(tmp_path / "fresh"))
    assert not same_bits(weights(out), weights(adapter))


def test_another_machine_goes_on_in_its_own_precision(
    left: tuple[Path, list[str]], adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, flags = left
    begun = flags.index("--bf16")
    here(monkeypatch, *flags[:begun], *flags[begun + 2 :], "--precision", "bf16")
    printed = capsys.readouterr().out
    assert f"{resume_folder(out)} was begun with precision fp32: going on with bf16" in printed
    assert f"going on from {resume_folder(out) / 'checkpoint-10'}" in printed
    assert "precision: bf16 on cpu (as asked" in printed
    ours, theirs = weights(out), weights(adapter)
    assert not same_bits(ours, theirs)
    for name, value in ours.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, theirs[name], rtol=0.2, atol=0.05)


@pytest.mark.parametrize("optimiser", ["adamw_torch_fused", "sgd"])
def test_a_training_that_diverges_leaves_nothing(
    sft_flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    optimiser: str,
) -> None:
    out = tmp_path / "out"
    flags = ["--learning_rate", "1e38", "--method", "lora", "--bf16", "false", "--save_steps", "1"]
    with pytest.raises(SystemExit) as stopped:
        here(monkeypatch, *sft_flags, *flags, "--optim", optimiser, "--output_dir", str(out))
    assert stopped.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"error: training diverged at step \d+: the .*; lower learning_rate=1e\+38, or max_grad", message)
    assert not out.exists()
    for weights_file in resume_folder(out).glob("checkpoint-*/*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(weights_file).values())


# --- (e) two processes ------------------------------------------------------------------------------------------

WORKER = '''
"""Run the stage once for each line of flags; every rank leaves what it starts the training with."""
import json, sys
from pathlib import Path
from accelerate import PartialState
from safetensors.torch import save_file
from reasonrec.recipes import sft
from reasonrec.recipes.trainers import item_sft

class Watched(item_sft.ItemSFTTrainer):
    def train(self, *args, **kwargs):
        state = PartialState()
        assert state.num_processes == 2, state
        start = {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}
        save_file(start, Path(sys.argv[0]).with_name(f"{Path(self.args.output_dir).stem}-{state.process_index}.start"))
        return super().train(*args, **kwargs)

item_sft.ItemSFTTrainer = Watched
for flags in json.loads(Path(sys.argv[1]).read_text()):
    sys.argv[1:] = flags
    sft.run(sft.main)()
'''


def test_two_processes_agree_with_one(
    sft_flags: list[str], lora_flags: list[str], torchrun: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float32, no dropout, SGD: the same examples per step give the same losses and weights.

    A loss that each process averages over its own tokens would differ: texts and prefixes make them unequal.
    """
    sequences = Dataset.load(sft_flags[1]).train["items"].to_list()
    part = 160 / (2 * sum(len(items) - 1 for items in sequences))  # whole batches: a rest would be padded by repeats
    sgd = [
        *("--method", "full", "--bf16", "false", "--optim", "sgd", "--learning_rate", "0.3", "--logging_steps", "1"),
        *("--tasks", "{seqrec: 1, index2item: 1}", "--one_per_prefix", "true", "--num_train_epochs", str(part)),
        *("--activation_checkpointing", "false", "--report_to", "none", "--save_strategy", "no"),
    ]
    size = "--per_device_train_batch_size"
    full = [*sft_flags, *sgd, size, "4", "--output_dir", str(tmp_path / "two")]
    lora = [*sft_flags, *lora_flags, size, "4", "--num_train_epochs", "0.25", "--output_dir", str(tmp_path / "lora")]
    (tmp_path / "flags.json").write_text(json.dumps([full, [*lora, "--report_to", "none"]]))
    (tmp_path / "worker.py").write_text(WORKER)
    printed = torchrun(tmp_path / "worker.py", tmp_path / "flags.json").stdout
    for name in ("two", "lora"):
        assert same_bits(*(load_file(tmp_path / f"{name}-{rank}.start") for rank in (0, 1)))
        assert printed.count(f"{tmp_path / name} holds the") == 1, "one process saves"
    assert any(".lora_A." in name for name in load_file(tmp_path / "lora-1.start"))

    here(monkeypatch, *sft_flags, *sgd, size, "8", "--output_dir", str(tmp_path / "one"))
    losses = {}
    for name in ("one", "two"):
        log = json.loads((tmp_path / name / "train_metrics.json").read_text())["log"]
        losses[name] = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses["one"]) == 20
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-5)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-6, msg=name)


# --- (f) a user's mistakes --------------------------------------------------------------------------------------


@pytest.fixture
def mistake(
    sft_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run with flags that end in status 2 and leave nothing behind; gives the message."""

    def run(*flags: str) -> str:
        out = tmp_path / "out"
        existed = out.exists()
        with pytest.raises(SystemExit) as stopped:
            here(monkeypatch, *sft_flags, "--output_dir", str(out), *flags)
        assert stopped.value.code == 2
        assert out.exists() == existed
        assert not resume_folder(out).exists()
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        return lines[0]

    return run


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--learning_rat", "1"], ["--learning_rat", "'learning_rate'"]),
        (["--method", "lorra"], ["lorra", "full", "lora", "qlora"]),
        (["--tasks", "{seqrek: 1}"], ["'seqrek'", "seqrec, item2index"]),
        (["--tasks", "{seqrec: -1}"], ["tasks[seqrec]=-1 has to be at least 0"]),
        (["--max_history", "0"], ["max_history=0"]),
        (["--history_prompt", "Past:"], ["'Past:'", "{history}"]),
        (["--packing", "true"], ["--packing is not supported here", "max_history"]),
        (["--method", "full", "--row_learning_rate", "1"], ["row_learning_rate", "lora and qlora"]),
        (["--model", "/nowhere/model"], ["model=/nowhere/model", "a local folder"]),
        (["--dataset", "nowhere"], ["nowhere", "run its stage"]),
    ],
    ids=lambda value: " ".join(value)[:30],
)
def test_mistakes_are_named(mistake: Callable[..., str], flags: list[str], words: list[str]) -> None:
    message = mistake(*flags)
    assert all(word in message for word in words), message


def test_an_existing_output_is_kept(mistake: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert "--overwrite" in mistake()


def test_an_index_of_another_dataset_is_refused(
    stage: Stage, sft_flags: list[str], other_world: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = stage("sft", *sft_flags, "--index", str(other_world[1]), "--output_dir", str(out), status=2)
    message = done.stderr.splitlines()[-1]
    assert message.startswith("error: ")
    assert "Traceback" not in done.stderr
    for path in (other_world[0], Path(sft_flags[1])):
        assert read_manifest(path).hash[:12] in message
    assert "recipes/index_items.py" in message
    assert not out.exists()
    assert not resume_folder(out).exists()
