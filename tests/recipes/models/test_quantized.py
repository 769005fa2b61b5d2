"""4-bit weights on a CPU: expanded once, they are the numbers that bitsandbytes computes with at every step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from transformers import LlamaConfig, LlamaForCausalLM

from reasonrec.recipes.models import quantized
from reasonrec.recipes.models.load import LoraSettings, add_adapter, load_base
from reasonrec.recipes.models.precision import Precision, choose
from reasonrec.recipes.models.quantized import expanded, free_memory
from reasonrec.recipes.trainers.item_sft import save_weights
from reasonrec.tokenizers.vocabulary import Vocabulary

CPU = torch.device("cpu")


def four_bit(base: Path, asked: str, monkeypatch, *, once: bool):
    with monkeypatch.context() as patch:
        if not once:
            patch.setattr(quantized, "free_memory", lambda: 0)
        return load_base(str(base), method="qlora", precision=choose(asked, "cpu"))


@pytest.mark.parametrize("asked", ["fp32", "bf16"])
def test_expanded_once_the_numbers_are_those_of_every_step(tiny_base, monkeypatch, asked):
    """Bit for bit: outputs, and gradients with respect to what a LoRA layer would see."""
    plain, stepwise = (four_bit(tiny_base, asked, monkeypatch, once=once) for once in (True, False))
    layers = {n: m for n, m in stepwise.named_modules() if isinstance(m, Linear4bit)}
    assert len(layers) == 14
    assert not any(isinstance(module, Linear4bit) for module in plain.modules())
    for name, layer in layers.items():
        x = torch.randn(3, 5, layer.in_features, dtype=choose(asked, "cpu").dtype, requires_grad=True)
        outputs, gradients = [], []
        for module in (layer.train(), plain.get_submodule(name)):
            y = module(x)
            outputs.append(y)
            gradients.append(torch.autograd.grad(y.float().square().sum(), x)[0])
        assert torch.equal(*outputs), name
        torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)
    ids = torch.arange(12)[None]
    assert torch.equal(plain.train()(ids).logits, stepwise.train()(ids).logits)


def test_biases_are_kept(tmp_path, monkeypatch):
    config = LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        attention_bias=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data.normal_()
    model.save_pretrained(tmp_path)
    plain, stepwise = (four_bit(tmp_path, "fp32", monkeypatch, once=once) for once in (True, False))
    assert plain.model.layers[0].self_attn.q_proj.bias.abs().min() > 0
    ids = torch.arange(12)[None]
    assert torch.equal(plain.train()(ids).logits, stepwise.train()(ids).logits)


@pytest.mark.parametrize("once", [True, False])
def test_inference_in_float32_is_in_float32(tiny_base, monkeypatch, once):
    """bitsandbytes' kernel for packed weights would round to bf16 whatever the compute dtype says."""
    model = four_bit(tiny_base, "fp32", monkeypatch, once=once).eval()
    weights = {
        name: expanded(module, torch.float32).weight if isinstance(module, Linear4bit) else module.weight
        for name, module in model.named_modules()
        if name.endswith("_proj")
    }
    exact = load_base(str(tiny_base), method="full", precision=choose("fp32", "cpu")).eval()
    with torch.no_grad():
        for name, weight in weights.items():
            exact.get_submodule(name).weight.copy_(weight)
        ids = torch.arange(20)[None]
        for _ in range(2):  # packing would happen in the first pass and tell in the second
            assert torch.equal(model(ids).logits, exact(ids).logits)


def test_an_expanded_model_trains_and_saves_as_an_ordinary_one(tiny_base, monkeypatch, tmp_path):
    model = four_bit(tiny_base, "fp32", monkeypatch, once=True)
    assert not getattr(model, "is_loaded_in_4bit", False)
    assert not getattr(model.config, "quantization_config", None)
    wrapped = add_adapter(model, Vocabulary((2,), begin_id=390).token_ids, LoraSettings(2, 4, 0.0, "all-linear"))
    assert {p.dtype for p in wrapped.parameters()} == {torch.float32}
    assert sum(p.requires_grad for n, p in wrapped.named_parameters() if "lora" in n) == 2 * 14
    wrapped(torch.arange(8)[None]).logits.sum().backward()
    assert all(p.grad is None for n, p in wrapped.named_parameters() if not p.requires_grad)
    save_weights(wrapped, tmp_path)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size < 100_000, "nothing of the expanded weights is saved"


def test_the_run_says_which(tiny_base, monkeypatch, capsys):
    four_bit(tiny_base, "fp32", monkeypatch, once=True)
    assert "4-bit weights are expanded once (" in capsys.readouterr().out
    four_bit(tiny_base, "fp32", monkeypatch, once=False)
    assert "4-bit weights are expanded at every step: " in capsys.readouterr().out


def test_half_of_the_free_memory_decides(tiny_base, monkeypatch):
    needed = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 128 * 3) * 4
    for free, once in ((2 * needed, True), (2 * needed - 2, False)):
        monkeypatch.setattr(quantized, "free_memory", lambda free=free: free)
        model = load_base(str(tiny_base), method="qlora", precision=Precision("fp32", CPU, ""))
        assert once != any(isinstance(module, Linear4bit) for module in model.modules())


def test_free_memory_is_that_of_the_container_and_shared_by_its_processes(tmp_path, monkeypatch):
    alone = free_memory()
    assert alone > 0
    monkeypatch.setattr(quantized, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    assert free_memory() == 600_000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory() == 150_000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory() > 600_000
