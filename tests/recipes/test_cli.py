"""The console command."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from reasonrec.recipes.cli import STAGES, main

ROOT = Path(__file__).parents[2]


def command(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """As pip's script calls it."""
    code = "import sys; from reasonrec.recipes.cli import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", code, *words], cwd=cwd, capture_output=True, text=True, check=False)


def test_every_stage_has_a_name() -> None:
    scripts = {path.stem for path in (ROOT / "recipes").glob("*.py") if "__main__" in path.read_text(encoding="utf-8")}
    assert set(STAGES.values()) == scripts
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"] == {"reasonrec": "reasonrec.recipes.cli:main"}


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_the_stages_are_listed(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["reasonrec", *words])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(STAGES)
    assert "  prepare     Turn raw interactions into a dataset: read, clean, filter, split." in lines


@pytest.mark.parametrize(("wrong", "right"), [("prepar", "prepare"), ("evaluate", "eval"), ("index_items", "index")])
def test_an_unknown_stage_names_the_nearest(wrong: str, right: str, tmp_path: Path) -> None:
    done = command(wrong, "--k", "3", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: there is no stage '{wrong}'; did you mean '{right}'?\n"


def test_a_stage_runs(tmp_path: Path) -> None:
    flags = ["--source", "synthetic", "--train_users", "20", "--held_out_users", "5", "--output_dir", "d"]
    done = command("prepare", *flags, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "d" / "manifest.json").is_file()
    again = command("prepare", "--source", "synthetic", "--output_dir", "d", cwd=tmp_path)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr.startswith("error: ")
    assert again.stderr.count("\n") == 1


def test_help_is_called_by_its_name(tmp_path: Path) -> None:
    done = command("eval", "--help", cwd=tmp_path)
    assert done.stdout.startswith("usage: reasonrec eval [--config FILE] [--key value ...]\n")


def test_a_reader_that_leaves_ends_it_in_silence(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)  # as `reasonrec --help | head` does when it has read enough
    code = "from reasonrec.recipes.cli import main; main()"
    words = [sys.executable, "-c", code, "--help"]
    found = subprocess.run(words, cwd=tmp_path, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (found.returncode, found.stderr) == (141, "")
