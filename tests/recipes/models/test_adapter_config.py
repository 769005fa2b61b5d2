"""From an adapter's configuration only what a training of this kit decides is taken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reasonrec.recipes.models.adapter_config import read_adapter_config
from reasonrec.recipes.recommender import Recommender
from reasonrec.tokenizers.artefact import file_hash
from reasonrec.tokenizers.errors import UserError

FILE = "adapter_config.json"
HOSTILE: dict[str, Any] = {
    "auto_mapping": {"base_model_class": "Model", "parent_library": "hostile"},
    "peft_type": "PROMPT_TUNING",
    "task_type": "SEQ_CLS",
    "modules_to_save": ["lm_head"],
    "runtime_config": {"ephemeral_gpu_offload": True},
    "init_lora_weights": "corda",
    "corda_config": {"cache_file": "/etc/passwd"},
    "megatron_config": {"a": 1},
    "megatron_core": "hostile",
    "layer_replication": [[0, 9]],
    "revision": "other",
    "of_a_newer_peft": {"read": "/etc/passwd"},
    "r": "many",
    "target_modules": {"a": 1},
    "trainable_token_indices": "all",
}


@pytest.fixture
def hostile(adapter: Path, tmp_path: Path, edit_manifest: Callable[..., None]) -> Callable[..., Path]:
    """A function that makes an adapter say something else, as its author could have."""

    def make(**keys: Any) -> Path:
        folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
        text = json.dumps(json.loads((folder / FILE).read_text()) | keys)

        def change(manifest: Any) -> None:
            (folder / FILE).write_text(text)
            manifest.files[FILE] = file_hash(folder / FILE)

        edit_manifest(folder, change)
        return folder

    return make


@pytest.mark.parametrize("name", HOSTILE)
def test_what_this_kit_does_not_write_is_refused(hostile: Callable[..., Path], name: str) -> None:
    with pytest.raises(UserError, match=rf"{FILE} (has '{name}'|is no configuration)") as refused:
        Recommender.from_pretrained(hostile(**{name: HOSTILE[name]}))
    assert "\n" not in str(refused.value)


def test_where_it_says_its_base_is_does_not_matter(hostile: Callable[..., Path], adapter: Path) -> None:
    folder = hostile(base_model_name_or_path="https://example.org/base", inference_mode=False, peft_version="99")
    expected = Recommender.from_pretrained(adapter).rank([[1, 2]])
    assert (Recommender.from_pretrained(folder).rank([[1, 2]])[0] == expected[0]).all()


def test_a_key_of_another_peft_that_says_nothing_is_fine(hostile: Callable[..., Path], adapter: Path) -> None:
    found = read_adapter_config(hostile(of_a_newer_peft=None, another=False), "base")
    there = json.loads((adapter / FILE).read_text())
    assert found.base_model_name_or_path == "base"
    assert found.r == there["r"]
    assert sorted(found.target_modules or ()) == there["target_modules"]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"r": 1, "r": 2}'])
def test_a_damaged_file_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(UserError, match="is no configuration of this kit's adapters"):
        read_adapter_config(tmp_path, "base")
