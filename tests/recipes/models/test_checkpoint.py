"""What a trained model says of itself is checked before anything is made of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from reasonrec.recipes.models.checkpoint import Setting, training_data
from reasonrec.recipes.recommender import Recommender
from reasonrec.tokenizers.artefact import file_hash, read_manifest
from reasonrec.tokenizers.catalogue import CATALOGUE_FILE
from reasonrec.tokenizers.errors import UserError


@pytest.fixture
def copied(adapter: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapter, tmp_path / "adapter"))


def refused(folder: Path, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        Recommender.from_pretrained(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("base_model", 5), ("base_model", ["a"]), ("method", "pickle"), ("history_prompt", "{history.__class__}"),
        ("history_prompt", None), ("chat", "yes"), ("system", 1), ("max_history", 0), ("max_history", "many"),
        ("one_per_prefix", None), ("fingerprint", 1),
    ],
)  # fmt: skip
def test_a_setting_that_no_training_writes(
    copied: Path, key: str, value: Any, edit_manifest: Callable[..., None]
) -> None:
    edit_manifest(copied, lambda manifest: manifest.facts["setting"].update({key: value}))
    refused(copied, key)


@pytest.mark.parametrize("setting", [None, [], "text", {}])
def test_no_setting_at_all(copied: Path, setting: Any, edit_manifest: Callable[..., None]) -> None:
    edit_manifest(copied, lambda manifest: manifest.facts.update(setting=setting))
    refused(copied, "has nothing as base_model")


def test_trust_and_other_keys_of_older_settings_are_nothing(copied: Path, edit_manifest: Callable[..., None]) -> None:
    right = Setting.stored(read_manifest(copied))
    edit_manifest(copied, lambda manifest: manifest.facts["setting"].update(trust_remote_code=True, more=1))
    edit_manifest(copied, lambda manifest: manifest.facts["setting"].pop("one_per_prefix"))
    assert Setting.stored(read_manifest(copied)) == right
    assert not hasattr(right, "trust_remote_code")


@pytest.mark.parametrize(
    "reference",
    ["https://example.org/base", "package:hostile", "package:hostile.module", "package:__main__", "package:sys", "\0"],
)
def test_a_base_that_is_no_model_is_not_opened(
    copied: Path,
    reference: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    point: Callable[[Path, str], None],
) -> None:
    """Its package is looked for, not imported."""
    (tmp_path / "hostile").mkdir()
    for name in ("__init__", "module"):
        (tmp_path / "hostile" / f"{name}.py").write_text("raise RuntimeError('it ran')")
    monkeypatch.syspath_prepend(tmp_path)
    point(copied, reference)
    refused(copied, "is an adapter of the base model .*, which does not load")


@pytest.mark.parametrize("value", [None, 5, ["a"]])
def test_a_dataset_that_is_no_folder(copied: Path, value: Any, edit_manifest: Callable[..., None]) -> None:
    """Only a training that goes on asks for it."""
    edit_manifest(copied, lambda manifest: manifest.config.update(dataset=value))
    with pytest.raises(UserError, match="does not say where its dataset is: pass --dataset PATH"):
        training_data(read_manifest(copied), copied)
    edit_manifest(copied, lambda manifest: manifest.config.update(dataset="https://example.org/data"))
    with pytest.raises(UserError, match=r"at .https://example.org/data., where nothing is now: pass --dataset PATH"):
        training_data(read_manifest(copied), copied)
    Recommender.from_pretrained(copied)


def test_another_dataset_is_refused(adapter: Path, tiny_dataset: Path, other_world: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match=r"made with dataset .* train again") as refused:
        training_data(read_manifest(adapter), adapter, other_world[0])
    for path in (tiny_dataset, other_world[0]):
        assert read_manifest(path).hash[:12] in str(refused.value)


@pytest.mark.parametrize("catalogue", [None, [], {}, {"name": "x", "mask_history": "no", "dataset": "y"}])
def test_a_catalogue_that_no_training_writes(copied: Path, catalogue: Any, edit_manifest: Callable[..., None]) -> None:
    edit_manifest(copied, lambda manifest: manifest.facts.update(catalogue=catalogue))
    refused(copied, "does not say what its catalogue is")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda items: items.drop("brand"), "has other columns than this kit writes"),
        (lambda items: items.with_columns(title=None), "has other columns than this kit writes"),
        (lambda items: items[:-1], "codes of 48 items do not fit a catalogue of 47"),
    ],
)
def test_items_that_no_training_writes(
    copied: Path, change: Any, why: str, tmp_path: Path, edit_manifest: Callable[..., None]
) -> None:
    change(pl.read_parquet(copied / CATALOGUE_FILE)).write_parquet(tmp_path / CATALOGUE_FILE)
    digest = file_hash(tmp_path / CATALOGUE_FILE)
    edit_manifest(copied, lambda manifest: manifest.files.update({CATALOGUE_FILE: digest}))
    shutil.copy(tmp_path / CATALOGUE_FILE, copied / CATALOGUE_FILE)
    refused(copied, why)


def test_a_link_out_of_the_folder(copied: Path, tmp_path: Path) -> None:
    (copied / "adapter_model.safetensors").rename(tmp_path / "weights")
    (copied / "adapter_model.safetensors").symlink_to(tmp_path / "weights")
    refused(copied, "is a link out of")
