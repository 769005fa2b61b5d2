"""What a stage lets libraries print."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from reasonrec.recipes.args import run


def test_warnings_are_one_line_and_deprecations_nobodys_business(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        warnings.warn("item 7 is\nunknown\x1b[1m", stacklevel=1)
        warnings.warn("use something else", FutureWarning, stacklevel=1)
        warnings.warn("use something else", DeprecationWarning, stacklevel=1)

    run(main)()
    assert capsys.readouterr().err == "warning: item 7 is unknown\\x1b[1m\n"
    with pytest.warns(UserWarning, match="afterwards"):  # Python users keep Python's
        warnings.warn("afterwards", stacklevel=1)


CODE = """
import json, os, sys, warnings
from reasonrec.recipes.args import run

def main():
    from huggingface_hub.utils import are_progress_bars_disabled
    from tqdm import tqdm
    for _ in [*tqdm(range(3), disable=None), *tqdm(range(3))]:
        pass
    warnings.warn("old", FutureWarning)
    print(json.dumps([os.environ["OMP_WAIT_POLICY"], are_progress_bars_disabled()]))

assert not {"torch", "numpy", "polars"} & set(sys.modules)
run(main)()
"""


def child(tmp_path: Path, *flags: str, **environment: str) -> tuple[list[object], str]:
    done = subprocess.run(
        [sys.executable, *flags, "-c", CODE],
        cwd=tmp_path, env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), **environment}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout), done.stderr


def test_a_process_waits_passively_and_draws_no_bars_into_a_file(tmp_path: Path) -> None:
    assert child(tmp_path) == (["PASSIVE", True], "")


def test_what_the_user_set_stays(tmp_path: Path) -> None:
    found, error = child(tmp_path, "-Wdefault", OMP_WAIT_POLICY="ACTIVE", HF_HUB_DISABLE_PROGRESS_BARS="0")
    assert found == ["ACTIVE", False]
    assert "FutureWarning: old" in error
