"""What a machine computes in: bf16 where that is fast, fp16 on older CUDA cards, fp32 everywhere else.

One place decides for training, 4-bit compute, rollouts and inference alike. A dtype that a device lacks is not refused
by PyTorch but emulated, at a fifth of the speed of float32 or less: hence the choice by hardware, not by model.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from accelerate.utils import parse_flag_from_env

from reasonrec.recipes.keys import PrecisionName
from reasonrec.tokenizers.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Name = Literal["bf16", "fp16", "fp32"]
Loaded = TypeVar("Loaded")
DTYPES: dict[Name, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_AMPERE = (8, 0)  # compute capability of the first CUDA cards with bf16


@dataclass(frozen=True)
class Precision:
    """What a device computes in.

    Attributes:
        name: bf16, fp16 or fp32.
        device: The device.
        why: The reason, for people.
    """

    name: Name
    device: torch.device
    why: str

    @property
    def dtype(self) -> torch.dtype:
        """Of activations, of frozen weights, and of 4-bit compute."""
        return DTYPES[self.name]

    def weights(self, method: str) -> torch.dtype:
        """Of the base model's weights in training: what trains in full stays float32, under autocast."""
        return torch.float32 if method == "full" else self.dtype

    def apply(self, args: Any) -> None:
        """Tell transformers' arguments: both flags, for TRL takes an absent `bf16` for true.

        Once more after they were built: a launcher's ACCELERATE_MIXED_PRECISION gives way too.
        """
        args.bf16, args.fp16 = self.name == "bf16", self.name == "fp16"
        args.mixed_precision = "no" if self.name == "fp32" else self.name

    def __str__(self) -> str:
        return f"precision: {self.name} on {self.device} ({self.why})"


def asked_for(precision: PrecisionName, *, bf16: bool | None = None, fp16: bool = False) -> PrecisionName:
    """What transformers' own flags say in our word, for those who know them by heart.

    Args:
        precision: Our key.
        bf16: TRL's flag, None if it was not given.
        fp16: TRL's flag.

    Raises:
        UserError: If they contradict each other.
    """
    flags = [name for name, on in (("bf16", bf16), ("fp16", fp16)) if on]
    if len({*flags, precision} - {"auto"}) > 1:
        given = [*(f"{name}: true" for name in flags), *([] if precision == "auto" else [f"precision: {precision}"])]
        raise UserError(f"{' and '.join(given)} contradict each other: give precision only")
    if precision != "auto":
        return precision
    if flags:
        return "bf16" if bf16 else "fp16"
    return "fp32" if bf16 is False else "auto"


def decide(args: Any) -> Precision:
    """The precision of a training, written into its arguments before transformers checks them.

    Args:
        args: A `TrainingArguments` with our key `precision`.
    """
    # transformers refuses bf16 without an accelerator unless it is told that the CPU is meant.
    args.use_cpu = args.use_cpu or not torch.accelerator.is_available()
    asked = asked_for(args.precision, bf16=args.bf16, fp16=args.fp16)
    chosen = choose(asked, default_device(use_cpu=args.use_cpu))
    chosen.apply(args)
    return chosen


def choose(asked: PrecisionName | torch.dtype | None = "auto", device: torch.device | str | None = None) -> Precision:
    """What to compute in.

    Args:
        asked: What the user asked for, by name or as a dtype; `auto` (or None) follows the hardware.
        device: Where; the default device of a training or a recommendation if unset.

    Raises:
        UserError: If the name is unknown, or the device cannot do what was asked.
    """
    if asked is None:
        asked = "auto"
    if isinstance(asked, torch.dtype):
        asked = next((name for name, dtype in DTYPES.items() if dtype == asked), asked)
    if asked not in ("auto", *DTYPES):
        raise UserError(f"precision={asked} has to be one of auto, {', '.join(DTYPES)}")
    device = torch.device(device) if device is not None else default_device()
    native, why = hardware(device)
    if asked == "auto":
        return Precision(native, device, why)
    if asked == "fp16" and device.type == "cpu":
        raise UserError(f"precision=fp16 is for GPUs, this runs on the CPU: use auto (which is {native} here) or fp32")
    if asked == "bf16" and native != "bf16":
        return Precision(asked, device, f"as asked, though slow: {why}")
    return Precision(asked, device, "as asked")


def hardware(device: torch.device) -> tuple[Name, str]:
    """The fastest precision of a device that training can rely on, and the reason."""
    if device.type == "cuda":
        if torch.version.hip is not None:
            native = torch.cuda.is_bf16_supported(including_emulation=False)
            return ("bf16", "the GPU has bf16") if native else ("fp16", "the GPU has no bf16")
        capability = torch.cuda.get_device_capability(device)
        version = ".".join(map(str, capability))
        if capability >= _AMPERE:
            return "bf16", f"compute capability {version} has bf16"
        return "fp16", f"compute capability {version} has no bf16"
    if device.type == "cpu":
        return _cpu()
    if device.type == "mps":
        native = torch.backends.mps.is_macos_or_newer(14, 0)
        return ("bf16", "Metal has bf16") if native else ("fp32", "Metal before macOS 14 has no bf16")
    module = torch.get_device_module(device)
    native = getattr(module, "is_bf16_supported", lambda: False)()
    return ("bf16", f"{device.type} has bf16") if native else ("fp32", f"{device.type} reports no bf16")


def _cpu() -> tuple[Name, str]:
    """CPUs: instructions by CPUID *and* by the kernels PyTorch chose, which an environment variable may hold back."""
    kernels = torch.backends.cpu.get_cpu_capability()
    instructions = {"AVX512-BF16": torch.cpu._is_avx512_bf16_supported(), "AMX": torch.cpu._is_amx_tile_supported()}
    found = [name for name, there in instructions.items() if there]
    if kernels == "AVX512" and found:
        return "bf16", f"the CPU has {found[-1]}"
    if found:
        return "fp32", f"the CPU has {found[-1]}, but PyTorch's kernels use {kernels}"
    return "fp32", "the CPU has no fast bf16"


def default_device(*, use_cpu: bool = False) -> torch.device:
    """Where training runs: this process' accelerator if there is one, unless the CPU is asked for."""
    if use_cpu or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available():
        return torch.device("cpu")
    kind = torch.accelerator.current_accelerator()
    assert kind is not None  # one is available
    return torch.device(kind.type, int(os.environ.get("LOCAL_RANK", "0")))


def of_encoder(asked: PrecisionName, device: str | None) -> Callable[[torch.dtype], torch.dtype]:
    """What the weights of a text encoder are computed in, by the dtype that they are stored in.

    Float32 stays as it is with `auto`: the same codes on every machine are worth more than seconds. Many encoders are
    stored in bf16, though, and would crawl on hardware without it.
    """
    chosen = choose(asked, device)
    return lambda stored: stored if asked == "auto" and stored == torch.float32 else chosen.dtype


def load_finite(
    load: Callable[[Precision], Loaded],
    chosen: Precision,
    model_of: Callable[[Loaded], PreTrainedModel],
    *,
    autocast: bool = False,
) -> tuple[Loaded, Precision]:
    """Load a model, once more in float32 if its first logits do not fit into float16.

    Gemma's and Qwen2.5's activations can exceed float16's largest number, 65504; trained so, everything is NaN.

    Args:
        load: Loads it in a precision, with whatever comes with it.
        chosen: The precision wanted.
        model_of: Finds the model in what `load` returns.
        autocast: Weights are float32 and only the products are in the precision (full fine-tuning).

    Returns:
        What was loaded, and the precision it is really in.
    """
    loaded = load(chosen)
    if chosen.name != "fp16" or finite_logits(model_of(loaded), chosen, autocast=autocast):
        return loaded, chosen
    del loaded
    fallback = Precision("fp32", chosen.device, "the model's first logits in fp16 are not finite")
    return load(fallback), fallback


@torch.no_grad()
def finite_logits(model: PreTrainedModel, precision: Precision, *, autocast: bool = False) -> bool:
    """Whether the logits of a few tokens, spread over the vocabulary, are all finite."""
    size = model.get_input_embeddings().weight.shape[0]
    ids = torch.linspace(0, size - 1, min(size, 32), device=precision.device).long()[None]
    training = model.training
    model.to(precision.device).eval()
    with torch.autocast(precision.device.type, dtype=precision.dtype, enabled=autocast):
        logits = model(input_ids=ids, use_cache=False).logits
    model.train(training)
    return bool(logits.isfinite().all())
