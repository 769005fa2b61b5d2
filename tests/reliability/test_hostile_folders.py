"""A stranger's adapter or model that brings code of its own runs none of it, whatever its manifest says."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from reasonrec.recipes import eval_ranking, grpo, recommend, sft
from reasonrec.recipes.recommender import Recommender
from reasonrec.tokenizers.errors import UserError

CODE = """
from pathlib import Path
Path(__file__).with_name("it_ran").touch()
Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM

class Config(LlamaConfig):
    model_type = "hostile"

class Model(LlamaForCausalLM):
    config_class = Config
"""


@pytest.fixture(scope="module")
def world(
    tiny_base: Path,
    tiny_dataset: Path,
    tiny_index: Path,
    tmp_path_factory: pytest.TempPathFactory,
    edit_manifest: Callable[..., None],
) -> dict[str, Path]:
    """An adapter whose manifest trusts its base, and whose base has code of its own by now."""
    folder = tmp_path_factory.mktemp("hostile")
    base, adapter, marker = folder / "base", folder / "adapter", folder / "marker"
    shutil.copytree(tiny_base, base)
    flags = ["--dataset", str(tiny_dataset), "--index", str(tiny_index), "--model", str(base), "--method", "lora"]
    flags += ["--num_train_epochs", "0.2", "--max_history", "6", "--report_to", "none", "--output_dir", str(adapter)]
    subprocess.run([sys.executable, sft.__file__, *flags], check=True, capture_output=True)
    edit_manifest(adapter, lambda manifest: manifest.facts["setting"].update(trust_remote_code=True))
    config = json.loads((base / "config.json").read_text())
    names = {"AutoConfig": "hostile.Config", "AutoModelForCausalLM": "hostile.Model"}
    (base / "config.json").write_text(json.dumps(config | {"model_type": "hostile", "auto_map": names}))
    (base / "hostile.py").write_text(CODE.format(marker=str(marker)))
    tokenizer = json.loads((base / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["hostile.Tokenizer", "hostile.Tokenizer"]}
    (base / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return {"base": base, "adapter": adapter, "marker": marker, "dataset": tiny_dataset, "index": tiny_index}


ENTRIES = {
    "recommend": (recommend, lambda w: ["--model", w["adapter"], "--history", "1,2"]),
    "eval_ranking": (eval_ranking, lambda w: ["--dataset", w["dataset"], "--models", w["adapter"]]),
    "sft that goes on": (sft, lambda w: ["--dataset", w["dataset"], "--index", w["index"], "--model", w["adapter"]]),
    "sft from the base": (sft, lambda w: ["--dataset", w["dataset"], "--index", w["index"], "--model", w["base"]]),
    "grpo": (grpo, lambda w: ["--model", w["adapter"]]),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_no_stage_runs_a_folders_code(
    world: dict[str, Path], entry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, flags = ENTRIES[entry]
    out = [] if module is recommend else ["--output_dir", str(tmp_path / "out")]
    more = ["--method", "lora", "--max_history", "6"] if module is sft else []
    monkeypatch.setattr(sys, "argv", [entry, *map(str, flags(world)), *more, *out])
    with pytest.raises(UserError, match="code of its own; if you trust it, pass --trust_remote_code true") as refused:
        module.main()
    assert "\n" not in str(refused.value)
    assert not world["marker"].exists()
    assert not (tmp_path / "out").exists()


def test_python_runs_it_only_when_told(world: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="code of its own"):
        Recommender.load(world["adapter"])
    assert not world["marker"].exists()
    config = AutoConfig.from_pretrained(world["base"], trust_remote_code=True)
    AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert world["marker"].exists(), "the code does what the other tests look for"
    world["marker"].unlink()
