"""Chains written by vLLM, beside the training on each process' own GPU.

TRL's `VLLMGeneration` starts the engine and feeds it. What it would feed by itself is a PEFT model, whose code rows no
engine knows; so it is given a merged copy instead, the first time as a folder. What is asked is ours: a seed for every
chain, and no end but those that a chain has.

Written against TRL 1.16 and the versions of vLLM that it names, and never run: that needs a GPU. Tests cover what is
refused, what the engine is given and what it is asked.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from importlib import metadata
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from packaging.requirements import Requirement

from reasonrec.recipes.decoding.chain_writers import Written
from reasonrec.recipes.models.merged import merged_copy
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.terminal import say

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from reasonrec.recipes.decoding.sample import Sampler

DTYPE = torch.bfloat16  # what the engine computes in
INSTEAD = "leave chain_engine out, or set chain_engine=own"


def check_vllm() -> None:
    """Refuse vLLM where it cannot work.

    Raises:
        UserError: As `check_version`; or if there is no GPU that computes in bf16.
    """
    try:
        installed = metadata.version("vllm")
    except metadata.PackageNotFoundError:
        installed = None
    check_version(installed)
    if not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)):
        raise UserError(f"chain_engine=vllm needs a GPU with bf16 (Ampere or newer), and none is here: {INSTEAD}")


def check_version(installed: str | None) -> None:
    """Refuse a version of vLLM that TRL does not know.

    Args:
        installed: The version; None if there is none.

    Raises:
        UserError: If it is none, or not in TRL's range.
    """
    needed = next(part for part in map(Requirement, metadata.requires("trl") or []) if part.name == "vllm").specifier
    if installed is None or not needed.contains(installed, prereleases=True):
        found = "it is not installed" if installed is None else f"{installed} is installed"
        raise UserError(
            f"chain_engine=vllm needs vllm {needed} (TRL {metadata.version('trl')}), and {found}: "
            f'pip install "vllm{needed}", or {INSTEAD}'
        )


def engine_copy(model: Any, eos_id: int) -> PreTrainedModel:
    """What the engine is given: the policy as an ordinary causal LM.

    Args:
        model: The trained model, without the wrappers of a distributed training.
        eos_id: What ends a sequence.

    Raises:
        UserError: If it has weights that its architecture does not.
    """
    from transformers import GenerationConfig

    whole = merged_copy(model, DTYPE)
    with torch.device("meta"):
        plain = type(whole)(whole.config)
    if more := sorted(whole.state_dict().keys() ^ plain.state_dict().keys()):
        raise UserError(
            f"chain_engine=vllm serves plain {whole.config.model_type} models, and this one differs in "
            f"{', '.join(more[:3])}: {INSTEAD}"
        )
    whole.generation_config = GenerationConfig(eos_token_id=eos_id)
    return whole


def request(
    prompts: Sequence[Sequence[int]],
    sampler: Sampler,
    stop_ids: Sequence[int],
    noise: NDArray[np.float64] | None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What the engine is asked: a prompt and the arguments of vLLM's `SamplingParams` for every chain.

    A closing delimiter of several tokens cannot stop the engine; what it writes behind one is dropped later.

    Args:
        prompts: See `ChainWriter`; so are the others.
        sampler: How to draw.
        stop_ids: Tokens that end a chain.
        noise: The first number of a chain is its seed.
    """
    stop = [*stop_ids, *(sampler.close_ids if len(sampler.close_ids) == 1 else ())]
    asked = {
        "temperature": 0.0 if sampler.greedy else sampler.temperature,
        "max_tokens": sampler.max_chain,
        "stop_token_ids": sorted(set(stop)),
        "ignore_eos": True,  # what ends a sequence is among these; the base model's configuration may name more
        "logprobs": 0,  # that of the token drawn
        "detokenize": False,
    }
    shape = (len(prompts), sampler.generations)
    seeds = np.zeros(shape, np.int64) if noise is None else (noise[..., 0] * 2**53).astype(np.int64)
    rows = [{"prompt_token_ids": list(prompt)} for prompt in prompts for _ in range(sampler.generations)]
    return rows, [asked | {"seed": int(seed)} for seed in seeds.flatten()]


class VllmWriter:
    """Lets vLLM write.

    Args:
        trainer: The trainer, built: its model, tokenizer and arguments. `check_vllm` has been asked.

    Raises:
        UserError: As `engine_copy`.
    """

    def __init__(self, trainer: Any) -> None:
        from trl.generation.vllm_generation import VLLMGeneration

        if trainer.accelerator.is_main_process:
            say("chain_engine=vllm: written against TRL 1.16, and not run by those who wrote it; watch engine_gap")
        self._model = trainer.accelerator.unwrap_model(trainer.model)
        self._eos_id = trainer.eos_token_ids[0]
        self._at = trainer.state.global_step  # whose weights the engine has: it reads them at its start
        whole = engine_copy(self._model, self._eos_id)
        with TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # the engine reads it once, at its start
            whole.save_pretrained(folder)
            trainer.processing_class.save_pretrained(folder)
            whole.name_or_path = folder
            self._engine: Any = VLLMGeneration(
                whole,
                trainer.accelerator,
                trainer.processing_class,
                mode="colocate",
                gpu_memory_utilization=trainer.args.vllm_gpu_memory_utilization,
            )
        self._engine.model = None

    def update(self, step: int) -> None:
        """Feed the engine a new copy, unless the weights are those it has."""
        if step == self._at:
            return
        self._engine.model = engine_copy(self._model, self._eos_id)
        self._engine.sync_weights()
        self._engine.model = None
        gc.collect()
        torch.cuda.empty_cache()  # the copy's memory is for the training
        self._at = step

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        sampler: Sampler,
        *,
        stop_ids: Sequence[int],
        noise: NDArray[np.float64] | None,
    ) -> Written:
        """See `ChainWriter`."""
        from trl.generation.vllm_generation import extract_logprobs
        from vllm import SamplingParams

        rows, asked = request(prompts, sampler, stop_ids, noise)
        params = [SamplingParams(**one) for one in asked]
        outputs = self._engine.llm.generate(rows, sampling_params=params, use_tqdm=False)
        token_ids = [list(output.outputs[0].token_ids) for output in outputs]
        values, _ = extract_logprobs(outputs)
        return Written(token_ids, [[np.nan if own[0] is None else own[0] for own in row] for row in values])
