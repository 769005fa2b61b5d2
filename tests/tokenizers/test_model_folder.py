"""The folder of somebody's model leads to nothing outside of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reasonrec.recipes.models.load import load_base, load_tokenizer
from reasonrec.tokenizers.embed import load_encoder
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.model_folder import check_links, check_model_folder

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def folder(tiny_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "model"))


def link(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent / "weights")
    (folder / WEIGHTS).symlink_to(folder.parent / "weights")


def edit(file: str, **keys: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / file
        path.parent.mkdir(exist_ok=True)
        there = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(there | keys))

    return change


def without_weights(folder: Path) -> None:
    (folder / "2_Dense").mkdir()
    (folder / "2_Dense" / "pytorch_model.bin").touch()


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


HOSTILE = {
    "a link": (link, "is a link out of"),
    "a link to a folder": (lambda f: (f / "more").symlink_to(f.parent), "is a link out of"),
    "a link to itself": (lambda f: (f / "more").symlink_to("more"), "is a link out of"),
    "an adapter": (edit("adapter_config.json", base_model_name_or_path="/etc"), "an adapter of another model"),
    "a pickle": (pickled, "is a pickle, which is never loaded"),
    "a module's pickle": (without_weights, "is a pickle, which is never loaded"),
    "weights above": (edit(INDEX, weight_map={"a": "../b.safetensors"}), "names the weights"),
    "weights elsewhere": (edit(INDEX, weight_map={"a": "/b.safetensors"}), "names the weights"),
    "weights without a name": (edit(INDEX, weight_map={"a": 1}), "names the weights"),
    "explicit weights": (edit("config.json", transformers_weights="../b.safetensors"), "in transformers_weights"),
    "a kernel": (edit("config.json", attn_implementation="some/kernel"), "'some/kernel' in attn_implementation"),
    "a kernel below": (edit("config.json", text_config={"_attn_implementation": {"": "a/b:c"}}), "'a/b:c' in _attn"),
    "a tokenizer": (edit("sentence_bert_config.json", tokenizer_name_or_path="gpt2"), "'gpt2' in tokenizer_name"),
    "an argument": (edit("sentence_bert_config.json", model_args={"cache_dir": "/etc"}), "'/etc' in model_args"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
    "deep JSON": (lambda f: (f / "config.json").write_text("[" * 99_999), "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_leads_elsewhere_is_refused_wherever_a_model_is_loaded(folder: Path, name: str) -> None:
    check_model_folder(folder)
    change, words = HOSTILE[name]
    change(folder)
    for load in (lambda f: load_base(f, method="lora"), load_tokenizer, load_encoder):
        with pytest.raises(UserError, match=words) as refused:
            load(str(folder))
        assert "\n" not in str(refused.value)


def test_what_libraries_write_is_fine(folder: Path) -> None:
    edit("config.json", attn_implementation="sdpa", _name_or_path="/somewhere/else")(folder)
    edit("sentence_bert_config.json", model_kwargs={"dtype": "float16"}, tokenizer_name_or_path=None)(folder)
    edit(INDEX, weight_map={"a": "model-00001-of-00002.safetensors"})(folder)
    (folder / "pytorch_model.bin").touch()  # beside safetensors, as many have it
    check_model_folder(folder)


def test_links_of_the_hubs_cache_are_fine(folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "models--somebody--model"
    snapshot = home / "snapshots" / ("0" * 40)
    shutil.copytree(folder, snapshot)
    (home / "blobs").mkdir()
    (snapshot / WEIGHTS).rename(home / "blobs" / "abc")
    (snapshot / WEIGHTS).symlink_to("../../blobs/abc")
    check_links(snapshot)
    load_base(str(snapshot), method="lora")
    (snapshot / "other").symlink_to("../../refs")
    with pytest.raises(UserError, match="other is a link out of"):
        check_links(snapshot)


def test_a_tokenizer_reads_no_file_elsewhere(folder: Path, tmp_path: Path) -> None:
    """transformers prefers the folder's own files to those that its configuration names."""
    right = load_tokenizer(str(folder)).encode("small oak lamp")
    other = tmp_path / "nothing.json"
    edit("tokenizer_config.json", tokenizer_file=str(other), vocab_file=str(other), merges_file=str(other))(folder)
    assert load_tokenizer(str(folder)).encode("small oak lamp") == right
