from __future__ import annotations

import os
from pathlib import Path

import pytest

from reasonrec.tokenizers.environment import expand_home, wait_passively
from reasonrec.tokenizers.errors import UserError


def test_the_home_folder_is_written_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_home("~", "x") == str(tmp_path)
    assert expand_home("~/a/~b", "x") == f"{tmp_path}/a/~b"
    for other in ("", "a", "/a/~", "package:NAME", "Qwen/Qwen3-0.6B", "./~", "a~", "~ a"):
        assert expand_home(other, "x") == other


@pytest.mark.parametrize("path", ["~nobody-here", "~nobody-here/data"])
def test_an_unknown_user(path: str) -> None:
    with pytest.raises(
        UserError, match=f"^dataset={path}: there is no user 'nobody-here' here; write the whole path$"
    ):
        expand_home(path, "dataset")


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "")
    with pytest.raises(UserError, match=r"^dataset=~/data: HOME is not set; write"):
        expand_home("~/data", "dataset")


def test_the_policy_of_the_user_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    wait_passively()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    wait_passively()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
