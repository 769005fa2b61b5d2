from __future__ import annotations

import dataclasses
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors import SafetensorError
from safetensors.numpy import save_file

from reasonrec.tokenizers import artefact
from reasonrec.tokenizers.artefact import (
    check_input,
    kit_version,
    read_manifest,
    staged,
    write_json,
)
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.manifest import Manifest, content_hash
from reasonrec.tokenizers.output import (
    MANIFEST,
    MARKER,
    claim_output,
    partial_folder,
    release_output,
    resume_folder,
    start_folder,
)


def make(out: Path, text: str = "one", **options: object) -> Manifest:
    with staged(out, kind="notes", config={"text": text}, **options) as (folder, facts):  # type: ignore[arg-type]
        (folder / "a.txt").write_text(text)
        (folder / "deep").mkdir(exist_ok=True)
        (folder / "deep" / "b.txt").write_text("b")
        (folder / "report.html").write_text("<p>changes with the date</p>")
        facts["n"] = 3
    return read_manifest(out)


def test_an_artefact_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "new" / "data"
    with staged(out, kind="notes", config={"k": 5}, seed=7, inputs={"raw": "abc"}) as (folder, facts):
        assert folder == partial_folder(out)
        assert not out.exists()
        (folder / "a.txt").write_text("a")
        facts["n"] = 1
    assert sorted(p.name for p in tmp_path.joinpath("new").iterdir()) == ["data"]
    manifest = read_manifest(out, "notes")
    assert (manifest.kind, manifest.config, manifest.seed) == ("notes", {"k": 5}, 7)
    assert (manifest.inputs, manifest.facts) == ({"raw": "abc"}, {"n": 1})
    assert list(manifest.files) == ["a.txt"]
    assert manifest.kit_version == kit_version() == "0.1.0"


def test_the_hash_is_of_the_content_alone(tmp_path: Path) -> None:
    one, same = make(tmp_path / "one"), make(tmp_path / "two", seed=9, inputs={"x": "y"})
    other = make(tmp_path / "three", text="two")
    assert one.hash == same.hash == one.content()
    assert one.hash != other.hash
    assert set(one.files) == {"a.txt", "deep/b.txt"}, "what a person looks at is not hashed"


def test_a_moved_file_changes_the_hash() -> None:
    assert content_hash({"a": "1", "b": "2"}) == content_hash({"b": "2", "a": "1"})
    assert content_hash({"a": "1", "b": "2"}) != content_hash({"a": "2", "b": "1"})


def test_an_exception_leaves_no_artefact(tmp_path: Path) -> None:
    out = tmp_path / "data"
    with pytest.raises(RuntimeError, match="bang"), staged(out, kind="notes", config={}) as (folder, _):
        (folder / "half.txt").write_text("half")
        raise RuntimeError("bang")
    assert not out.exists()
    assert partial_folder(out).is_dir()
    with pytest.raises(UserError, match=r"data is unfinished \(.*data\.partial exists\): run its stage again"):
        read_manifest(out)
    make(out)
    assert sorted(p.name for p in out.iterdir()) == ["a.txt", "deep", MANIFEST, "report.html"], (
        "the rerun starts clean"
    )
    assert not partial_folder(out).exists()


def test_resume_state_goes_when_the_artefact_stands(tmp_path: Path) -> None:
    out = tmp_path / "data"
    start_folder(resume_folder(out))
    kept = resume_folder(out) / "checkpoint.txt"
    kept.write_text("step 3")
    with pytest.raises(KeyboardInterrupt), staged(out, kind="notes", config={}):
        raise KeyboardInterrupt
    with staged(out, kind="notes", config={}) as (folder, _):
        assert kept.read_text() == "step 3"
        (folder / "weights.txt").write_text("step 9")
    assert read_manifest(out).files.keys() == {"weights.txt"}
    assert not resume_folder(out).exists()


def test_an_existing_artefact_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "data"
    first = make(out)
    with pytest.raises(UserError, match=r"output_dir=.*data exists already; .* pass --overwrite to move it aside"):
        make(out, text="two")
    assert read_manifest(out).hash == first.hash
    with pytest.raises(UserError, match="exists already"):
        claim_output(out, overwrite=False)
    assert claim_output(str(out), overwrite=True) == out
    release_output(out)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_overwrite_moves_it_aside(tmp_path: Path) -> None:
    out, old = tmp_path / "data", tmp_path / "data.old"
    hashes = [make(out, text=text, overwrite=True).hash for text in ("one", "two", "three")]
    assert (read_manifest(out).hash, read_manifest(old).hash) == (hashes[2], hashes[1])


def test_a_failed_overwrite_touches_nothing(tmp_path: Path) -> None:
    out = tmp_path / "data"
    first = make(out)
    with pytest.raises(RuntimeError), staged(out, kind="notes", config={}, overwrite=True) as (folder, _):
        (folder / "a.txt").write_text("half")
        raise RuntimeError
    assert read_manifest(out).hash == first.hash
    assert not (tmp_path / "data.old").exists()


def test_a_loader_notices_every_change(tmp_path: Path) -> None:
    out = tmp_path / "data"
    make(out)
    with pytest.raises(UserError, match="is of kind 'notes', needed is 'index'"):
        read_manifest(out, "index")
    (out / "report.html").write_text("someone edited the report")
    read_manifest(out, "notes")
    (out / "a.txt").write_text("changed")
    with pytest.raises(UserError, match=r"a\.txt was changed after .*data was made: run its stage again"):
        read_manifest(out)
    (out / "a.txt").unlink()
    with pytest.raises(UserError, match=r"a\.txt is missing: run the stage that made .*data again"):
        read_manifest(out)


@pytest.mark.parametrize("linked", [True, False])
def test_an_artefact_shares_files_of_another(linked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make(tmp_path / "first")
    if not linked:

        def refuse(*_: object) -> None:
            raise OSError(errno.EXDEV, "another file system")

        monkeypatch.setattr(os, "link", refuse)
    hashed: list[str] = []
    take = artefact.file_hash
    monkeypatch.setattr(artefact, "file_hash", lambda path: hashed.append(path.name) or take(path))
    old, new = tmp_path / "first" / "a.txt", tmp_path / "second" / "a.txt"
    with staged(tmp_path / "second", kind="notes", config={}, shared={old: first.files["a.txt"]}) as (folder, _):
        assert (folder / "a.txt").read_text() == "one"
        (folder / "more.txt").write_text("more")
    assert hashed == (["more.txt"] if linked else ["a.txt", "more.txt"])  # a copy may have gone wrong
    assert new.samefile(old) == linked
    assert read_manifest(tmp_path / "second").files["a.txt"] == first.files["a.txt"]
    # Each stands for itself: it can go, be copied, and is checked on its own.
    shutil.copytree(tmp_path / "second", tmp_path / "third")
    shutil.rmtree(tmp_path / "first")
    assert read_manifest(tmp_path / "second").hash == read_manifest(tmp_path / "third").hash
    new.write_text("two")
    read_manifest(tmp_path / "third")
    with pytest.raises(UserError, match=r"second.a\.txt was changed"):
        read_manifest(tmp_path / "second")


def test_what_changed_since_it_was_verified_is_found_later(tmp_path: Path) -> None:
    first = make(tmp_path / "first")
    (tmp_path / "first" / "a.txt").write_text("two")
    shared = {tmp_path / "first" / "a.txt": first.files["a.txt"]}
    with staged(tmp_path / "second", kind="notes", config={}, shared=shared):
        pass
    with pytest.raises(UserError, match=r"second.a\.txt was changed"):
        read_manifest(tmp_path / "second")


@pytest.mark.parametrize("text", ["", "{", '{"kind": "notes"}', '{"kind": "x", "config": {}, "seed": 0, "odd": 1}'])
def test_a_damaged_manifest_is_a_clear_error(tmp_path: Path, text: str) -> None:
    make(tmp_path / "data")
    (tmp_path / "data" / MANIFEST).write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json is damaged .*: run the stage that made .* again"):
        read_manifest(tmp_path / "data")


def test_no_artefact_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no artefact of this kit \(it has no manifest\.json\)"):
        read_manifest(tmp_path)


def test_check_input_names_both_hashes_and_the_remedy(tmp_path: Path) -> None:
    right, wrong = make(tmp_path / "right"), make(tmp_path / "wrong", text="two")
    index = Manifest(kind="index", config={}, seed=0, inputs={"dataset": right.hash})
    check_input(index, "dataset", right, "run X again")
    with pytest.raises(UserError) as caught:
        check_input(index, "dataset", wrong, "run X again")
    assert str(caught.value) == (
        f"this index was made with dataset {right.hash[:12]}…, but dataset {wrong.hash[:12]}… was given; run X again"
    )
    with pytest.raises(UserError, match="made with dataset nothing…"):
        check_input(dataclasses.replace(index, inputs={}), "dataset", wrong, "run X again")


def test_json_is_replaced_at_once(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"title": "Amélie", "path": tmp_path})
    assert json.loads(path.read_text(encoding="utf-8")) == {"title": "Amélie", "path": str(tmp_path)}
    circular: list[object] = []
    circular.append(circular)
    with pytest.raises(ValueError, match="Circular"):
        write_json(path, circular)
    assert json.loads(path.read_text(encoding="utf-8"))["title"] == "Amélie"


STAGE = """
import sys, time
from pathlib import Path
from reasonrec.tokenizers.artefact import staged

out, patience = Path(sys.argv[1]), float(sys.argv[2])
with staged(out, kind="notes", config={}, overwrite=True) as (folder, facts):
    (folder / "first.txt").write_text("first")
    print("half way", flush=True)
    time.sleep(patience)
    (folder / "second.txt").write_text("second")
"""


@pytest.mark.parametrize("existed", [False, True])
def test_kill_in_the_middle_of_a_stage(tmp_path: Path, existed: bool) -> None:
    out = tmp_path / "data"
    before = make(out).hash if existed else None
    with subprocess.Popen([sys.executable, "-c", STAGE, str(out), "60"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half way\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert sorted(p.name for p in partial_folder(out).iterdir()) == ["first.txt", MARKER]
    assert out.exists() == existed
    if existed:
        assert read_manifest(out).hash == before
    subprocess.run([sys.executable, "-c", STAGE, str(out), "0"], check=True, capture_output=True)
    assert read_manifest(out).files.keys() == {"first.txt", "second.txt"}
    assert not partial_folder(out).exists()


def _noise() -> np.ndarray:
    return np.random.default_rng(0).random(1 << 17)  # 1 MiB that no writer can compress


WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda folder: (folder / "x").write_text("x" * (1 << 20)),
    "json": lambda folder: write_json(folder / "x", ["x" * (1 << 20)]),
    "safetensors": lambda folder: save_file({"a": _noise()}, folder / "x"),
    "parquet": lambda folder: pl.DataFrame({"a": _noise()}).write_parquet(folder / "x"),
    "torch": lambda folder: torch.save(torch.from_numpy(_noise()), folder / "x"),
    "numpy": lambda folder: _noise().tofile(folder / "x"),
}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KiB."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root may mount a small file system")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this machine does not let root mount a small file system")
    yield disk
    for _ in range(20):
        if subprocess.run(["umount", disk], capture_output=True).returncode == 0:
            return
        time.sleep(0.1)
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk(small_disk: Path, writer: str) -> None:
    out = small_disk / "data"
    before = make(out).hash
    with (
        pytest.raises(UserError, match=r"the disk is full; .*data\.partial is unfinished and .*data was not touched"),
        staged(out, kind="notes", config={}, overwrite=True) as (folder, _),
    ):
        WRITERS[writer](folder)
    assert read_manifest(out).hash == before
    assert make(out, text="two", overwrite=True).hash != before, "the rerun starts clean"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("writer", ["text", "parquet"])
def test_a_write_that_finds_no_space(tmp_path: Path, writer: str) -> None:
    """The same without being root: the kernel's own device that is always full stands in for the file."""
    out = tmp_path / "data"
    with (
        pytest.raises(UserError, match="the disk is full"),
        staged(out, kind="notes", config={}) as (folder, _),
    ):
        (folder / "x").symlink_to("/dev/full")
        WRITERS[writer](folder)
    assert not out.exists()


def test_what_safetensors_says_of_a_full_disk(tmp_path: Path) -> None:
    """It writes beside the file and renames, so no device can stand in for the file: its words have to do."""
    error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(UserError, match="the disk is full"), staged(tmp_path / "data", kind="notes", config={}):
        raise error
    assert not (tmp_path / "data").exists()


def test_another_error_is_not_called_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError), staged(tmp_path / "data", kind="notes", config={}) as (folder, _):
        folder.write_text("a folder is no file")


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    """A quota that is no full disk ends the stage as it is, and leaves no artefact."""
    out = tmp_path / "data"
    code = STAGE.replace('"first")', '"first" * 100_000)')

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))

    done = subprocess.run(
        [sys.executable, "-c", code, str(out), "0"], capture_output=True, text=True, preexec_fn=limit, check=False
    )
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert not out.exists()
