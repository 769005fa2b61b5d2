from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from reasonrec.recipes.models.precision import choose
from reasonrec.recipes.trainers.resume import adopted, keep_or_clear, last_checkpoint
from reasonrec.tokenizers.artefact import read_manifest, staged
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.output import MARKER, partial_folder, resume_folder

PRECISION = choose("fp32", "cpu")


def checkpoint(folder: Path, step: int, state: str | None = "{}") -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    save_file({"a": torch.arange(9.0)}, path / "adapter_model.safetensors")
    torch.save({"step": torch.arange(99.0)}, path / "optimizer.pt")
    if state is not None:
        (path / "trainer_state.json").write_text(state)
    return path


def test_the_last_checkpoint_is_the_newest_whole_one(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "nowhere") is None
    assert last_checkpoint(tmp_path) is None
    checkpoint(tmp_path, 300, state=None)  # killed before the state was written
    assert last_checkpoint(tmp_path) is None
    nine, ten = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10)
    assert last_checkpoint(tmp_path) == ten, "by number, not by name"
    checkpoint(tmp_path, 11, state=json.dumps({"global_step": 11})[:-4])  # killed while it was written
    checkpoint(tmp_path, 12, state="")
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-best" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-20").write_text("no folder")
    assert last_checkpoint(tmp_path) == ten
    (ten / "trainer_state.json").unlink()
    assert last_checkpoint(tmp_path) == nine


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt"])
@pytest.mark.parametrize("harm", ["missing", "truncated", "empty"])
def test_a_checkpoint_needs_its_weights_and_its_optimiser(tmp_path: Path, name: str, harm: str) -> None:
    whole, torn = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    assert last_checkpoint(tmp_path) == torn
    if harm == "missing":
        (torn / name).unlink()
    else:
        content = (torn / name).read_bytes()
        (torn / name).write_bytes(content[: len(content) - 8] if harm == "truncated" else b"")
    assert last_checkpoint(tmp_path) == whole


def test_a_changed_byte_of_the_optimiser_is_noticed(tmp_path: Path) -> None:
    whole, torn = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    content = bytearray((torn / "optimizer.pt").read_bytes())
    at = content.index(torch.arange(99.0).numpy().tobytes())
    content[at + 5] ^= 1
    (torn / "optimizer.pt").write_bytes(content)
    assert last_checkpoint(tmp_path) == whole


def test_other_settings_clear_what_was_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    keep_or_clear(out, {"rate": 1, "save_steps": 5}, {"dataset": "a"}, PRECISION)
    left = checkpoint(resume_folder(out), 5)
    keep_or_clear(out, {"rate": 1, "save_steps": 9}, {"dataset": "a"}, PRECISION)
    assert left.is_dir()
    assert capsys.readouterr().out == ""
    keep_or_clear(out, {"rate": 1}, {"dataset": "b"}, PRECISION)
    assert not left.exists()
    assert capsys.readouterr().out == f"{resume_folder(out)} was begun with other settings (dataset): starting anew\n"


def test_a_folder_of_somebody_else_is_not_cleared(tmp_path: Path) -> None:
    out = tmp_path / "out"
    resume_folder(out).mkdir()
    (resume_folder(out) / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"out\.resume is nothing of this kit .*: move it away"):
        keep_or_clear(out, {}, {"dataset": "a"}, PRECISION)
    assert (resume_folder(out) / "thesis.tex").is_file()


def test_a_run_that_lacks_only_its_name_is_adopted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    about = {"kind": "notes", "config": {"rate": 1}, "seed": 0, "inputs": {"dataset": "a"}, "overwrite": False}
    with staged(out, **about) as (folder, _):
        (folder / "a.txt").write_text("a")
    out.rename(partial_folder(out))
    (partial_folder(out) / MARKER).write_text("{}")
    left = checkpoint(resume_folder(out), 5)
    (resume_folder(out) / MARKER).write_text("{}")
    assert not adopted(out, **about | {"config": {"rate": 2}})
    assert not adopted(out, **about | {"inputs": {"dataset": "b"}})
    assert not adopted(out, **about | {"kind": "other"})
    assert left.is_dir()
    assert adopted(out, **about)
    assert capsys.readouterr().out == f"{out} was whole but for its name, which it has now\n"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (out / MARKER).exists()
    assert read_manifest(out).config == {"rate": 1}
