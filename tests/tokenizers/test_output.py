from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from reasonrec.tokenizers import lock
from reasonrec.tokenizers.artefact import staged
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.lock import OutputLock, lock_path
from reasonrec.tokenizers.output import (
    MANIFEST,
    MARKER,
    claim_output,
    clear,
    is_held,
    kept_of,
    old_folder,
    partial_folder,
    release_output,
    resume_folder,
    start_folder,
)

HOLDER = """
import sys
from reasonrec.tokenizers.output import claim_output
claim_output(sys.argv[1], overwrite=False)
print("held", flush=True)
sys.stdin.read()
"""


def holder(out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLDER, str(out)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def make(out: Path) -> None:
    with staged(out, kind="notes", config={}) as (folder, _):
        (folder / "a.txt").write_text("a")


# --- one writer --------------------------------------------------------------------------------------------------


def test_a_second_process_says_who_writes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with holder(out) as process:
        with pytest.raises(UserError, match=rf"out is being written by process {process.pid} on .* \(-c .*out\)"):
            claim_output(out, overwrite=False)
        claim_output(tmp_path / "other", overwrite=False)
        release_output(tmp_path / "other")
        process.kill()
    claim_output(out, overwrite=False)  # the kernel let go with the process
    assert is_held(out)
    claim_output(out, overwrite=False)  # its own is no other's
    release_output(out)
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_ends_leaves_the_lock_free_and_gone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out)
    assert not lock_path(out).exists()
    assert not is_held(out)


def test_a_forked_worker_does_not_keep_the_lock(tmp_path: Path) -> None:
    """A data loader's worker may outlive the process that held the lock."""
    code = """
import os, sys
from reasonrec.tokenizers.output import claim_output
claim_output(sys.argv[1], overwrite=False)
if os.fork() == 0:
    print("forked", flush=True)
    sys.stdin.read()
os._exit(0)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "forked\n"
        parent.wait()
        claim_output(tmp_path / "out", overwrite=False)  # the child still runs
        release_output(tmp_path / "out")


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "fcntl", None)
    out = tmp_path / "out"
    with pytest.warns(UserWarning, match="this file system has no locks"):
        first = OutputLock(out)
    assert json.loads(lock_path(out).read_text())["process"] == os.getpid()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UserError, match=rf"being written by process {os.getpid()}"):
            OutputLock(out)
        old = lock_path(out).stat().st_mtime - lock.STALE - 60
        os.utime(lock_path(out), (old, old))  # nobody has touched it: its process was killed
        second = OutputLock(out)
    second.release()
    first.release()
    assert not lock_path(out).exists()


def test_only_the_first_process_of_a_run_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with holder(tmp_path / "out") as process:
        monkeypatch.setenv("RANK", "1")
        assert claim_output(tmp_path / "out", overwrite=False) == tmp_path / "out"
        process.kill()
    assert not is_held(tmp_path / "out")


# --- where nothing can be written -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["file", "file/below", "dangling", ".", "..", "x" * 250, "new/" + "y" * 300])
def test_a_place_that_cannot_be_written_is_one_line(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("not a folder")
    Path("dangling").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"output_dir=") as refused:
        claim_output(name, overwrite=True)
    assert "\n" not in str(refused.value)
    assert not is_held(Path(name))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file"]
    assert Path("file").read_text() == "not a folder"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"cannot be written .permission denied.: choose another one"):
        claim_output(tmp_path / "out", overwrite=False)
    tmp_path.chmod(0o700)


def test_a_device_is_no_place() -> None:
    with pytest.raises(UserError, match=r"output_dir=/proc/out cannot be written"):
        claim_output("/proc/out", overwrite=False)


# --- what is not ours --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [partial_folder, resume_folder, old_folder])
def test_a_folder_in_the_way_that_is_not_ours_stays(tmp_path: Path, which) -> None:
    out = tmp_path / "out"
    make(out)
    which(out).mkdir()
    (which(out) / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"is in the way of output_dir=.*nothing of this kit"):
        claim_output(out, overwrite=True)
    assert (which(out) / "thesis.tex").is_file()


def test_overwrite_takes_only_an_artefact(tmp_path: Path) -> None:
    out = tmp_path / "home"
    out.mkdir()
    (out / MANIFEST).write_text('{"name": "a web app", "icons": []}')
    with pytest.raises(UserError, match="is no artefact of this kit, so --overwrite does not touch it"):
        claim_output(out, overwrite=True)
    link = tmp_path / "link"
    make(tmp_path / "real")
    link.symlink_to(tmp_path / "real")
    with pytest.raises(UserError, match="is no artefact of this kit"):
        claim_output(link, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "link", "real"]


def test_clearing_ends_with_what_says_whose_it_is(tmp_path: Path) -> None:
    """A kill while a folder is cleared leaves one that can be cleared again."""
    folder = tmp_path / "out.partial"
    start_folder(folder)
    for name in ("a", "zz"):
        (folder / name).mkdir()
        (folder / name / "file").write_text("x")
    removed = []

    def note(event: str, arguments: tuple[object, ...]) -> None:
        if event in ("os.remove", "os.rmdir", "shutil.rmtree") and str(tmp_path) in str(arguments[0]):
            removed.append(Path(str(arguments[0])).name)

    sys.addaudithook(note)
    clear(folder)
    assert removed[-2:] == [MARKER, "out.partial"]
    clear(folder)  # nothing there, nothing to do


def test_what_an_interrupted_run_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert kept_of(out) == [f"of {out} nothing is kept"]
    for step in (9, 10):
        (resume_folder(out) / f"checkpoint-{step}").mkdir(parents=True)
    (tmp_path / "out.replies.jsonl").write_text("{}\n")
    assert kept_of(out) == [
        f"{resume_folder(out)} keeps the checkpoint of step 10",
        f"{tmp_path}/out.replies.jsonl keeps the replies so far",
    ]
