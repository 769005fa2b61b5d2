"""A stranger's folder that brings code of its own runs none of it, whatever it says; the one who loads it may."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reasonrec.data_gen.schema import Dataset
from reasonrec.recipes import eval_ranking, grpo, index_items, publish, recommend, sft, synthesize
from reasonrec.recipes.models.checkpoint import Setting
from reasonrec.recipes.models.load import load_tokenizer
from reasonrec.recipes.policies.base import build_policy
from reasonrec.recipes.policies.loading import load_fresh, save_checkpoint
from reasonrec.recipes.recommender import Recommender
from reasonrec.recipes.trainers.item_sft import save_weights
from reasonrec.tokenizers.artefact import staged
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.index import ItemIndex

CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast

class Config(LlamaConfig):
    model_type = "hostile"

class Model(LlamaForCausalLM):
    config_class = Config

class Body(LlamaModel):
    config_class = Config

class Tokenizer(PreTrainedTokenizerFast):
    pass
"""
REFUSED = "code of its own; if you trust it, pass --trust_remote_code true"


def bring_code(folder: Path, marker: Path, repository: str = "") -> None:
    """Give a model's folder code of its own, that another repository may hold."""
    config, tokenizer = folder / "config.json", folder / "tokenizer_config.json"
    names = {"AutoConfig": "Config", "AutoModelForCausalLM": "Model", "AutoModel": "Body"}
    code = {auto: f"{repository}hostile.{name}" for auto, name in names.items()}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "hostile", "auto_map": code}))
    code = {"AutoTokenizer": [None, f"{repository}hostile.Tokenizer"]}
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | {"auto_map": code}))
    (folder / "hostile.py").write_text(CODE.format(marker=str(marker)))


@pytest.fixture(scope="module")
def world(
    tiny_base: Path,
    tiny_dataset: Path,
    tiny_index: Path,
    tmp_path_factory: pytest.TempPathFactory,
    edit_manifest: Callable[..., None],
) -> dict[str, Path]:
    """An adapter whose manifest trusts its base, which has code of its own by now; a model and an encoder alike."""
    folder = tmp_path_factory.mktemp("hostile")
    paths = {name: folder / name for name in ("base", "adapter", "model", "elsewhere", "encoder", "marker")}
    base, marker = paths["base"], paths["marker"]
    shutil.copytree(tiny_base, base)
    flags = ["--dataset", str(tiny_dataset), "--index", str(tiny_index), "--model", str(base), "--method", "lora"]
    flags += ["--num_train_epochs", "0.2", "--max_history", "6", "--report_to", "none"]
    command = [sys.executable, sft.__file__, *flags, "--output_dir", str(paths["adapter"])]
    subprocess.run(command, check=True, capture_output=True)
    edit_manifest(paths["adapter"], lambda manifest: manifest.facts["setting"].update(trust_remote_code=True))

    setting = Setting(str(base), "full", "History:{history}", False, None, 6)
    dataset, index = Dataset.load(tiny_dataset), ItemIndex.load(tiny_index)
    policy = build_policy(dataset.catalogue(index), setting)
    assert index.manifest is not None
    inputs = {"dataset": dataset.manifest.hash, "index": index.manifest.hash}
    config = {"dataset": str(tiny_dataset), "index": str(tiny_index)}
    for name, repository in (("model", ""), ("elsewhere", "other/repository--")):
        with staged(paths[name], kind="model", config=config, inputs=inputs) as (work, facts):
            save_weights(load_fresh(setting, policy)[0], work)
            facts.update(save_checkpoint(work, setting, policy))
            bring_code(work, marker, repository)
    bring_code(base, marker)
    shutil.copytree(tiny_base, paths["encoder"])
    (paths["encoder"] / "hostile.py").write_text(CODE.format(marker=str(marker)))
    modules = [{"idx": 0, "name": "0", "path": "", "type": "hostile.Module"}]
    (paths["encoder"] / "modules.json").write_text(json.dumps(modules))
    return paths | {"dataset": tiny_dataset, "index": tiny_index}


TRACES = ["--rows", "20", "--valid_rows", "5"]
SHORT = ["--report_to", "none", "--num_train_epochs", "0.05", "--bf16", "false"]
REINFORCED = ["--valid_rows", "0", "--num_generations", "2", "--algorithm", "grpo", "--last_targets", "1", *SHORT]
ENTRIES: dict[str, tuple[Any, str]] = {
    "recommend": (recommend, "--model {adapter} --history 1,2"),
    "recommend with a full model": (recommend, "--model {model} --history 1,2"),
    "recommend with code elsewhere": (recommend, "--model {elsewhere} --history 1,2"),
    "eval_ranking": (eval_ranking, "--dataset {dataset} --models {adapter}"),
    "sft that goes on": (sft, "--dataset {dataset} --index {index} --model {adapter}"),
    "sft from the base": (sft, "--dataset {dataset} --index {index} --model {base}"),
    "grpo": (grpo, "--model {adapter}"),
    "index_items": (index_items, "--dataset {dataset} --codebook_sizes 4 4 --embedding_model {base}"),
    "index_items, own module": (index_items, "--dataset {dataset} --codebook_sizes 4 4 --embedding_model {encoder}"),
    "local teacher": (synthesize, "--dataset {dataset} --teacher local --max_new_tokens 4 --teacher_model {base}"),
    "publish, merged": (publish, "--model {adapter} --merge true --dry_run true"),
    "filter": (synthesize, "--dataset {dataset} --filter_model {adapter}"),
}
RUN = ["recommend", "sft from the base", "grpo", "index_items", "local teacher"]


def words(world: dict[str, Path], entry: str, out: Path) -> list[str]:
    module, flags = ENTRIES[entry]
    more = {sft: ["--method", "lora", "--max_history", "6", *SHORT], grpo: REINFORCED, synthesize: TRACES}
    return [
        *flags.format(**world).split(),
        *more.get(module, []),
        *([] if module is recommend else ["--output_dir", str(out)]),
    ]


@pytest.mark.parametrize("trust", [[], ["--trust_remote_code", "false"]], ids=["unsaid", "false"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_no_stage_runs_a_folders_code(
    world: dict[str, Path],
    entry: str,
    trust: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    report: Callable[[str, int, list[str]], None],
) -> None:
    monkeypatch.setattr(sys, "argv", [entry, *words(world, entry, tmp_path / "out"), *trust])
    with pytest.raises(UserError, match=REFUSED) as refused:
        ENTRIES[entry][0].main()
    assert "\n" not in str(refused.value)
    wrong = {"its code ran": world["marker"].exists(), "something was written": (tmp_path / "out").exists()}
    report("hostile folders", 1, [f"{entry}: {what}" for what, found in wrong.items() if found])


def test_a_tokenizer_that_needs_no_code_is_read_without_it(world: dict[str, Path]) -> None:
    """transformers has a class for what it holds."""
    assert load_tokenizer(str(world["base"])).encode("oak")
    assert not world["marker"].exists()


@pytest.mark.parametrize("folder", ["adapter", "model", "elsewhere"])
def test_python_does_not_either(world: dict[str, Path], folder: str) -> None:
    with pytest.raises(UserError, match=REFUSED):
        Recommender.from_pretrained(world[folder])
    assert not world["marker"].exists()


@pytest.mark.parametrize("entry", RUN)
def test_who_is_told_to_runs_it(world: dict[str, Path], entry: str, tmp_path: Path) -> None:
    """In a process of its own: transformers remembers code that it was told to run."""
    command = [sys.executable, ENTRIES[entry][0].__file__, *words(world, entry, tmp_path / "out")]
    done = subprocess.run([*command, "--trust_remote_code", "true"], capture_output=True, text=True, check=False)
    try:
        assert world["marker"].exists(), done.stderr[-2000:]
        if entry == "recommend":
            assert "log-prob" in done.stdout, done.stderr[-2000:]
    finally:
        world["marker"].unlink(missing_ok=True)


def test_python_runs_it_when_told(world: dict[str, Path]) -> None:
    code = "import sys; from reasonrec.recipes.recommender import Recommender as R; "
    code += "R.from_pretrained(sys.argv[1], trust_remote_code=True)"
    done = subprocess.run([sys.executable, "-c", code, str(world["adapter"])], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert world["marker"].exists()
    world["marker"].unlink()
