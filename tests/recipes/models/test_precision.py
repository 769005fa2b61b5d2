"""What is computed in: the hardware decides, the user overrides, and what cannot be is said."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from reasonrec.recipes.models import precision
from reasonrec.recipes.models.precision import (
    asked_for,
    choose,
    decide,
    default_device,
    finite_logits,
    load_finite,
    of_encoder,
)
from reasonrec.tokenizers.errors import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def machine(monkeypatch, *, kernels: str = "AVX2", bf16: bool = False, amx: bool = False) -> None:
    """A CPU that is not this one."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: kernels)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)


def card(monkeypatch, major: int, minor: int) -> None:
    """A CUDA card that is not here."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))


@pytest.mark.parametrize(
    ("kernels", "bf16", "amx", "expected"),
    [
        ("AVX512", True, False, "bf16"),  # AMD Zen 4, Intel Cooper Lake
        ("AVX512", True, True, "bf16"),  # Intel Sapphire Rapids
        ("AVX512", False, False, "fp32"),  # Intel Ice Lake: AVX-512 without the products
        ("AVX2", False, False, "fp32"),  # most laptops
        ("AVX2", True, True, "fp32"),  # held back by ATEN_CPU_CAPABILITY
        ("DEFAULT", False, False, "fp32"),
    ],
)
def test_a_cpu_needs_the_instructions_and_the_kernels(monkeypatch, kernels, bf16, amx, expected):
    machine(monkeypatch, kernels=kernels, bf16=bf16, amx=amx)
    chosen = choose("auto", "cpu")
    assert (chosen.name, chosen.dtype) == (expected, precision.DTYPES[expected])
    assert str(chosen).startswith(f"precision: {expected} on cpu (")


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 5), "fp16"), ((7, 0), "fp16"), ((8, 0), "bf16"), ((12, 0), "bf16")]
)
def test_a_cuda_card_needs_ampere(monkeypatch, capability, expected):
    card(monkeypatch, *capability)
    assert choose("auto", CUDA).name == expected


def test_an_old_card_may_be_asked_for_bf16_and_says_that_it_is_slow(monkeypatch):
    card(monkeypatch, 7, 5)
    assert str(choose("bf16", CUDA)) == (
        "precision: bf16 on cuda:0 (as asked, though slow: compute capability 7.5 has no bf16)"
    )


def test_what_is_asked_for_is_done(monkeypatch):
    machine(monkeypatch)
    assert choose("bf16", CPU).name == "bf16"
    assert "slow" in choose("bf16", CPU).why
    assert choose(torch.float32, CPU).name == choose("fp32", CPU).name == "fp32"
    assert choose(None, CPU).name == choose("auto", CPU).name


def test_what_cannot_be_is_refused(monkeypatch):
    machine(monkeypatch)
    with pytest.raises(UserError, match=r"precision=fp16 is for GPUs.*use auto \(which is fp32 here\) or fp32"):
        choose("fp16", CPU)
    with pytest.raises(UserError, match="precision=float32 has to be one of auto, bf16, fp16, fp32"):
        choose("float32", CPU)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"precision=torch\.float64 has to be one of"):
        choose(torch.float64, CPU)


@pytest.mark.parametrize(
    ("key", "bf16", "fp16", "expected"),
    [
        ("auto", None, False, "auto"),
        ("auto", True, False, "bf16"),
        ("auto", False, False, "fp32"),
        ("auto", None, True, "fp16"),
        ("auto", False, True, "fp16"),
        ("fp32", False, False, "fp32"),
        ("bf16", False, False, "bf16"),
        ("bf16", True, False, "bf16"),
    ],
)
def test_transformers_own_flags_are_understood(key, bf16, fp16, expected):
    assert asked_for(key, bf16=bf16, fp16=fp16) == expected


@pytest.mark.parametrize(("key", "bf16", "fp16"), [("fp32", True, False), ("bf16", None, True), ("auto", True, True)])
def test_flags_that_contradict_each_other_are_refused(key, bf16, fp16):
    with pytest.raises(UserError, match="contradict each other: give precision only"):
        asked_for(key, bf16=bf16, fp16=fp16)


def test_the_arguments_of_a_training_get_both_flags(monkeypatch):
    """TRL takes an absent `bf16` for true, and a launcher's environment would win over fp32."""
    machine(monkeypatch)
    args = SimpleNamespace(precision="auto", bf16=None, fp16=False, use_cpu=False, mixed_precision="bf16")
    chosen = decide(args)
    assert (args.bf16, args.fp16, args.mixed_precision, chosen.name) == (False, False, "no", "fp32")
    machine(monkeypatch, kernels="AVX512", bf16=True)
    args = SimpleNamespace(precision="auto", bf16=None, fp16=False, use_cpu=True)
    assert decide(args).name == "bf16"
    assert (args.bf16, args.fp16, args.mixed_precision) == (True, False, "bf16")


def test_full_fine_tuning_keeps_float32_weights(monkeypatch):
    machine(monkeypatch, kernels="AVX512", bf16=True)
    chosen = choose("auto", CPU)
    assert [chosen.weights(method) for method in ("full", "lora", "qlora")] == [
        torch.float32,
        torch.bfloat16,
        torch.bfloat16,
    ]


def test_the_cpu_is_where_training_runs_if_it_is_asked_for(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert default_device() == torch.device("cuda", 3)
    assert default_device(use_cpu=True) == CPU
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert default_device() == CPU


def test_an_encoder_keeps_float32_and_follows_the_hardware_in_less(monkeypatch):
    """The same codes on every machine; yet half precision where it would crawl is float32."""
    machine(monkeypatch)
    auto, asked = (of_encoder(name, "cpu") for name in ("auto", "bf16"))
    assert [auto(stored) for stored in (torch.float32, torch.bfloat16, torch.float16)] == [torch.float32] * 3
    assert asked(torch.float32) == torch.bfloat16


def loud(base, scale: float):
    """The tiny model with a norm so large that its activations exceed float16."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[0].post_attention_layernorm.weight.mul_(scale)
    return model


def test_logits_that_do_not_fit_into_float16_are_seen(tiny_base):
    half = precision.Precision("fp16", CPU, "")
    assert finite_logits(loud(tiny_base, 1.0).half(), half)
    assert not finite_logits(loud(tiny_base, 1e5).half(), half)
    assert not finite_logits(loud(tiny_base, 1e6), half, autocast=True), "float32 weights under autocast alike"
    assert finite_logits(loud(tiny_base, 1e5), precision.Precision("fp32", CPU, ""))


@pytest.mark.parametrize(("scale", "expected"), [(1.0, ["fp16"]), (1e5, ["fp16", "fp32"])])
def test_a_model_that_does_not_fit_is_loaded_in_float32(tiny_base, scale, expected):
    seen = []

    def load(chosen):
        seen.append(chosen.name)
        return loud(tiny_base, scale).to(chosen.dtype), "what comes with it"

    (model, rest), settled = load_finite(load, precision.Precision("fp16", CPU, ""), lambda loaded: loaded[0])
    assert seen == expected
    assert (settled.name, model.dtype, rest) == (expected[-1], settled.dtype, "what comes with it")


def test_a_cpu_that_is_held_back_gets_float32():
    """For real, in a process whose kernels an environment variable holds back."""
    code = "from reasonrec.recipes.models.precision import choose; print(choose('auto', 'cpu').name)"
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "fp32"
