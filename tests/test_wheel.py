"""The wheel holds the kit and nothing else, and works without the repository."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("recipes", "rewards", "data_gen", "tokenizers")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy of the tree, because a build leaves its own folders behind; nothing is downloaded."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in (*ROOMS, "tests", "examples"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    (source / "runs" / "demo").mkdir(parents=True)
    (source / "runs" / "demo" / "manifest.json").write_text("{}")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, cwd=out, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("reasonrec-*-py3-none-any.whl")
    return path


def test_it_holds_every_module_and_asset_and_nothing_else(wheel: Path) -> None:
    names = [PurePosixPath(name) for name in zipfile.ZipFile(wheel).namelist()]
    held = {name.as_posix() for name in names if not name.parts[0].endswith(".dist-info")}
    wanted = [path for room in ROOMS for path in (ROOT / room).rglob("*") if path.is_file()]
    wanted = [path for path in wanted if "__pycache__" not in path.parts]
    assert held == {f"reasonrec/{path.relative_to(ROOT).as_posix()}" for path in wanted}
    suffixes = {PurePosixPath(name).suffix for name in held}
    assert suffixes == {".py", ".yaml", ".md", ".html", ".css", ".js", ".svg", ".json", ".typed"}
    assert any(name.name == "LICENSE" for name in names)


IMPORT_ALL = """
import importlib, json, sys
names = sys.argv[1:]
print(json.dumps([importlib.import_module(name).__file__ for name in names]))
"""


def test_it_works_without_the_repository(wheel: Path, tmp_path: Path) -> None:
    site, cwd = tmp_path / "site", tmp_path / "elsewhere"
    cwd.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    files = sorted(path for path in site.rglob("*.py"))
    names = [".".join(path.relative_to(site).with_suffix("").parts).removesuffix(".__init__") for path in files]
    # The folder stands first, before any installation of the kit.
    code = f"import sys; sys.path.insert(0, {str(site)!r})\n{IMPORT_ALL}"
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [str(path) for path in files]
    template = site / "reasonrec" / "recipes" / "evaluation" / "report.html"
    assert template.read_bytes() == (ROOT / "recipes" / "evaluation" / "report.html").read_bytes()
