"""Beginning a training, or going on with one that was interrupted: what all training stages do alike."""

from __future__ import annotations

import json
import math
import os
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open

from reasonrec.recipes.keys import recorded
from reasonrec.recipes.models.precision import Precision
from reasonrec.recipes.models.shards import gather
from reasonrec.recipes.trainers.engine import is_sharded
from reasonrec.recipes.trainers.versions import versions
from reasonrec.tokenizers.artefact import adopt, write_json
from reasonrec.tokenizers.output import MARKER, disk_full_is_clear, resume_folder, start_folder
from reasonrec.tokenizers.terminal import say

LOGS = "logs"  # of TensorBoard
SHARDS = ("pytorch_model_fsdp_0", "optimizer_0")  # accelerate's folders

# These may change between an interrupted run and the one that goes on: they say what is written, not what is learned.
INDECISIVE = {"overwrite", "report_to", "run_name", "disable_tqdm", "logging_steps", "save_steps", "save_total_limit"}
# Another number of processes may go on with as many examples an update.
SHARES = ("per_device_train_batch_size", "gradient_accumulation_steps")
# So may these: another machine computes in something else, on another device. What trains is float32 everywhere.
HARDWARE = {"precision", "bf16", "fp16", "use_cpu"}


def train_in(out: Path, args: Any) -> Path:
    """Let a trainer keep its checkpoints and logs where an interrupted run is looked for.

    Args:
        out: Folder of the finished artefact.
        args: TRL's arguments; changed in place.

    Returns:
        The folder it works in.
    """
    work = resume_folder(out)
    args.output_dir = str(work)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(work / LOGS)  # else a folder named after this machine
    return work


def stage_config(stage: Any, args: Any, out: Path) -> dict[str, Any]:
    """The configuration as the manifest keeps it: no tokens, no paths of this machine.

    Args:
        stage: The stage's own keys, a dataclass.
        args: TRL's arguments.
        out: Folder of the finished artefact.
    """
    theirs = {name: value for name, value in args.to_sanitized_dict().items() if "token" not in name}
    return {**recorded(stage, out), **theirs, "output_dir": out.name}


def keep_or_clear(out: Path, config: Mapping[str, Any], inputs: Mapping[str, Any], precision: Precision) -> None:
    """Keep what an interrupted run of the same settings left behind, or clear it away and say why.

    Args:
        out: Folder of the finished artefact.
        config: From `stage_config`.
        inputs: Hashes of what is read: artefacts, the base model's weights, reward files. A name that `config` has
            too takes its place.
        precision: What this run computes in; the interrupted one may have computed in another, which is said.

    Raises:
        UserError: If something else is where the state of the run belongs.
    """
    state = PartialState()
    if state.is_main_process:
        folder = resume_folder(out)
        decisive = {name: value for name, value in config.items() if name not in INDECISIVE | HARDWARE}
        shares = [decisive.pop(name) for name in SHARES if name in decisive]
        decisive.pop("train_batch_size", None)  # the first of them again, under transformers' own name
        # Checkpoints of shards can be read where weights are shared out, by any number of processes.
        engine = {"examples an update": math.prod(shares) * state.num_processes, "sharded": is_sharded()}
        settings = {**decisive, **inputs, **engine}
        now = json.loads(
            json.dumps({"settings": settings, "free": {"precision": precision.name, **versions()}}, default=str)
        )
        try:
            found = json.loads((folder / MARKER).read_text(encoding="utf-8"))
            before, free = dict(found["settings"]), dict(found["free"])
        except (OSError, ValueError, TypeError, KeyError):
            before, free = {}, {}  # no run, or one that was stopped before it wrote anything of use
        names = sorted({*before, *now["settings"]})
        differing = [name for name in names if before.get(name) != now["settings"].get(name)]
        if differing:
            if before:
                say(f"{folder} was begun with other settings ({', '.join(differing)}): starting anew")
            start_folder(folder)
        else:
            for name, value in now["free"].items():
                if free.get(name, value) != value:
                    say(f"{folder} was begun with {name} {free[name]}: going on with {value}")
        write_json(folder / MARKER, now)
    state.wait_for_everyone()


def adopted(out: Path, **about: Any) -> bool:
    """Whether an earlier run of the same command was stopped with all of its work done; it then only lacked its name.

    Args:
        out: Folder of the finished artefact.
        **about: What `adopt` takes.
    """
    state = PartialState()
    (done,) = broadcast_object_list([state.is_main_process and adopt(out, **about)])
    return bool(done)


def train_or_resume(trainer: Any, out: Path) -> Any:
    """Train, from the last whole checkpoint if there is one; returns the trainer's result when all processes are done.

    Args:
        trainer: A transformers trainer that works in the output's resume folder.
        out: Folder of the finished artefact.
    """
    state, checkpoint = PartialState(), last_checkpoint(resume_folder(out))
    if checkpoint and state.is_main_process:
        say(f"going on from {checkpoint}")
    with disk_full_is_clear(out):
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    gather(trainer.model, keep=state.is_main_process)
    state.wait_for_everyone()
    return result


def keep_logs(out: Path, folder: Path) -> None:
    """Copy what TensorBoard reads from the resume folder into the artefact.

    Args:
        out: Folder of the finished artefact.
        folder: Where the artefact is built.
    """
    if (logs := resume_folder(out) / LOGS).is_dir():
        shutil.copytree(logs, folder / LOGS)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint: its weights, its optimiser and its state can be read."""
    numbered = [(path.name.rsplit("-", 1)[1], path) for path in folder.glob("checkpoint-*")]
    for _, path in sorted((int(number), path) for number, path in numbered if number.isdigit())[::-1]:
        if _is_whole(path):
            return path
    return None


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        if is_sharded():  # PyTorch writes what lies where last
            return all((checkpoint / name / ".metadata").is_file() for name in SHARDS)
        weights = list(checkpoint.glob("*.safetensors"))
        for path in weights:
            with safe_open(path, framework="pt"):  # its header says how long the file has to be
                pass
        with zipfile.ZipFile(checkpoint / "optimizer.pt") as archive:
            return bool(weights) and archive.testzip() is None
    except (OSError, ValueError, SafetensorError, zipfile.BadZipFile):
        return False
