"""What the documents tell people to type: every command is one that its stage takes, every Python block runs."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from reasonrec.recipes import args
from reasonrec.recipes.cli import STAGES
from reasonrec.recipes.serve import TOKEN

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").rglob("*.md")])
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
# What a reader puts in the place of a name of their own.
MINE = {"my/": "recipes/configs/example/", "$teacher": "co_visitation", "$model": "none", "$seed": "1"}


class Parsed(Exception):
    """A stage has taken its command line."""


def blocks(language: str) -> Iterator[tuple[str, str]]:
    for document in DOCUMENTS:
        for found, text in BLOCK.findall(document.read_text(encoding="utf-8")):
            if found == language:
                yield document.relative_to(ROOT).as_posix(), text


def commands() -> Iterator[tuple[str, str, list[str]]]:
    """Document, stage and words of each command that launches a stage."""
    for document, text in blocks("bash"):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                del words[0]
            if words[:2] == ["accelerate", "launch"]:
                at = next(i for i, word in enumerate(words) if word.startswith("recipes/") and word.endswith(".py"))
                if "<" not in words[at]:  # a pattern, not a command
                    yield document, Path(words[at]).stem, words[at + 1 :]
            elif words[:1] == ["reasonrec"]:
                yield document, STAGES[words[1]], words[2:]


COMMANDS = list(commands())


def test_there_are_commands_and_all_stages_among_them() -> None:
    assert len(COMMANDS) > 60
    assert {stage for _, stage, _ in COMMANDS} == set(STAGES.values())


@pytest.mark.parametrize(("document", "stage", "words"), COMMANDS, ids=lambda value: str(value)[:60])
def test_the_stage_takes_the_command(
    document: str, stage: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in MINE.items():
        words = [word.replace(name, value) for word in words]
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv(TOKEN, "sesame")
    module = importlib.import_module(f"reasonrec.recipes.{stage}")

    def parse(parts, argv=None):
        args.parse(parts, words)
        raise Parsed

    monkeypatch.setattr(module, "parse", parse)
    with pytest.raises(Parsed):
        module.main()


@pytest.mark.parametrize(("document", "text"), blocks("python"), ids=lambda value: str(value)[:30])
def test_a_python_block_runs(document: str, text: str, adapter: Path, tmp_path: Path) -> None:
    script = tmp_path / "block.py"
    if "def " in text:  # a reward
        script.write_text(
            text + "\nassert right_kind(predicted_codes=[(1, 2), None], target_codes=[(1, 3), (1, 2)]) == [1.0, 0.0]\n"
        )
    else:
        script.write_text(re.sub(r'"runs/[\w/]+"', repr(str(adapter)), text))
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if "print(" in text:
        assert len(done.stdout.splitlines()) == 10
