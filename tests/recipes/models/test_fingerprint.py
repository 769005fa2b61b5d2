"""An adapter knows its base by the stored weights, all of them, whatever they are loaded in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from reasonrec.recipes.models.fingerprint import PREFIX, fingerprint, fingerprint_like, loaded_fingerprint
from reasonrec.recipes.models.load import load_base
from reasonrec.recipes.models.precision import choose
from reasonrec.recipes.recommender import Recommender
from reasonrec.tokenizers.errors import UserError

WEIGHTS = "model.safetensors"
Weights = dict[str, torch.Tensor]


@pytest.fixture
def copy(tiny_base: Path, tmp_path: Path) -> Path:
    """A base model to change."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


@pytest.fixture
def untied(copy: Path) -> Path:
    """The same with a head of its own, in bfloat16 as published models are."""
    config = LlamaConfig.from_pretrained(copy, tie_word_embeddings=False)
    torch.manual_seed(1)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(copy)
    return copy


def change(folder: Path, edit: Callable[[Weights], object]) -> str:
    """The fingerprint of a folder after an edit of its weights."""
    weights = load_file(folder / WEIGHTS)
    edit(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    return fingerprint(str(folder))


def test_each_tensor_counts(copy: Path) -> None:
    first = load_file(copy / WEIGHTS)
    right = fingerprint(str(copy))
    assert right.startswith(PREFIX)
    for name, tensor in first.items():
        assert change(copy, lambda w, n=name, t=tensor: w.update({n: torch.zeros_like(t)})) != right, name
        save_file(first, copy / WEIGHTS)
    assert fingerprint(str(copy)) == right


def swap_rows(weights: Weights, name: str) -> None:
    weights[name] = weights[name][[1, 0, *range(2, len(weights[name]))]].clone()


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(lambda w: swap_rows(w, "model.layers.1.mlp.down_proj.weight"), id="two rows"),
        pytest.param(lambda w: w.update({n: t.to(torch.bfloat16) for n, t in w.items()}), id="dtype"),
        pytest.param(lambda w: w.update({n: t.to(torch.float16) for n, t in list(w.items())[:1]}), id="one dtype"),
        pytest.param(lambda w: w["model.norm.weight"].__setitem__(37, 0.5), id="one element of a vector"),
        pytest.param(lambda w: w.pop("model.norm.weight"), id="a tensor less"),
        pytest.param(lambda w: w.update(more=torch.zeros(0, 4)), id="an empty tensor more"),
        pytest.param(
            lambda w: w.update({"model.embed_tokens.weight": w["model.embed_tokens.weight"].T.contiguous()}),
            id="shape",
        ),
    ],
)
def test_what_differs_as_stored_differs(copy: Path, edit: Callable[[Weights], object]) -> None:
    right = fingerprint(str(copy))
    assert change(copy, edit) != right


def test_each_of_stacked_matrices_counts(tmp_path: Path) -> None:
    """Such as the experts of a layer, which one tensor holds."""
    experts = torch.randn(3, 20, 70)
    save_file({"experts": experts, "scale": torch.tensor(2.0)}, tmp_path / WEIGHTS)
    right = fingerprint(str(tmp_path))
    for number in range(3):
        changed = experts.clone()
        changed[number] = 0
        assert change(tmp_path, lambda w, c=changed: w.update(experts=c)) != right
    assert change(tmp_path, lambda w: w.update(experts=experts)) == right
    assert change(tmp_path, lambda w: w.update(scale=torch.tensor(3.0))) != right


def test_4_bit_weights_that_stand_in_one_column_are_read(tmp_path: Path) -> None:
    packed = torch.arange(4096, dtype=torch.int64).to(torch.uint8)[:, None].contiguous()
    save_file({"packed": packed}, tmp_path / WEIGHTS)
    right = fingerprint(str(tmp_path))
    assert change(tmp_path, lambda w: w["packed"][100].add_(1)) != right


@pytest.mark.parametrize("base", ["tied", "untied"])
def test_it_is_the_same_however_the_model_is_loaded(base: str, copy: Path, request: pytest.FixtureRequest) -> None:
    folder = copy if base == "tied" else request.getfixturevalue("untied")
    right = fingerprint(str(folder))
    models = {
        (method, asked): load_base(str(folder), method=method, precision=choose(asked, "cpu"))
        for method in ("full", "lora", "qlora")
        for asked in ("fp32", "bf16")
    }
    models["lora", "fp16"] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    for how, model in models.items():
        assert fingerprint_like(right, model, str(folder)) == right, how


def test_shards_in_any_order_are_one_model(untied: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(untied, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    shards = sorted((tmp_path / "shards").glob("model-*.safetensors"))
    assert len(shards) > 2
    assert fingerprint(str(tmp_path / "shards")) == fingerprint(str(untied))
    index = tmp_path / "shards" / "model.safetensors.index.json"
    there = json.loads(index.read_text())
    turned = {path.name: f"model-{number}.safetensors" for number, path in enumerate(reversed(shards))}
    for old, new in turned.items():
        (tmp_path / "shards" / old).rename(tmp_path / "shards" / new)
    there["weight_map"] = {name: turned[file] for name, file in there["weight_map"].items()}
    index.write_text(json.dumps(there))
    assert fingerprint(str(tmp_path / "shards")) == fingerprint(str(untied))


def test_a_hub_id_is_read_in_the_cache(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "hub" / "models--somebody--model"
    revision = "0" * 40
    shutil.copytree(copy, home / "snapshots" / revision)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(revision)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert fingerprint("somebody/model") == fingerprint(str(copy))


def test_a_model_without_safetensors_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="its safetensors files cannot be read"):
        fingerprint(str(tmp_path))


def test_an_adapter_refuses_a_base_whose_linear_layers_differ(adapter: Path, copy: Path) -> None:
    Recommender.from_pretrained(adapter, base_model=str(copy))
    change(copy, lambda w: w.update({n: torch.zeros_like(t) for n, t in w.items() if "proj" in n}))
    with pytest.raises(UserError, match=r"trained on base weights \w+… .*, but the base loaded now has \w+…"):
        Recommender.from_pretrained(adapter, base_model=str(copy))


def test_an_older_adapter_still_loads(
    adapter: Path, copy: Path, tmp_path: Path, edit_manifest: Callable[..., None]
) -> None:
    older = Path(shutil.copytree(adapter, tmp_path / "older"))
    first = loaded_fingerprint(load_base(str(copy), method="lora"))
    edit_manifest(older, lambda m: m.facts["setting"].update(fingerprint=first, trust_remote_code=True))
    Recommender.from_pretrained(older, base_model=str(copy))
    change(copy, lambda w: w["model.norm.weight"].mul_(2))
    with pytest.raises(UserError, match="trained on base weights"):
        Recommender.from_pretrained(older, base_model=str(copy))


@pytest.mark.parametrize("base", ["tied", "untied"])
def test_the_first_version_is_that_of_the_weights_however_loaded(
    base: str, copy: Path, request: pytest.FixtureRequest
) -> None:
    folder = str(copy if base == "tied" else request.getfixturevalue("untied"))
    prints = {method: loaded_fingerprint(load_base(folder, method=method)) for method in ("full", "lora", "qlora")}
    assert len(set(prints.values())) == 1, prints


def test_the_first_version_survives_float16(copy: Path) -> None:
    """Whose smallest number is 6e-8: weights that it cannot hold are read once more as they are stored."""
    change(copy, lambda w: w["model.embed_tokens.weight"][3].fill_(1e-9))
    as_stored, half = (AutoModelForCausalLM.from_pretrained(copy, dtype=d) for d in (torch.float32, torch.float16))
    assert loaded_fingerprint(half) != loaded_fingerprint(as_stored)
    right = loaded_fingerprint(as_stored)
    assert fingerprint_like(right, half, str(copy)) == right


def test_the_first_version_of_other_weights_differs(tiny_base: Path, untied: Path) -> None:
    model = load_base(str(tiny_base), method="full")
    first = loaded_fingerprint(model)
    assert first != loaded_fingerprint(load_base(str(untied), method="full"))
    for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.1.input_layernorm.weight"):
        with torch.no_grad():
            weight = model.get_parameter(name)
            kept = weight.clone()
            weight.view(-1)[7] += 0.5
            assert loaded_fingerprint(model) != first, name
            weight.copy_(kept)
    assert loaded_fingerprint(model) == first
