"""Which engine writes the chains of a training's rollouts: the sampler itself, or another one by name."""

from __future__ import annotations

from typing import Any

from reasonrec.recipes.decoding.chain_writers import ChainWriter
from reasonrec.recipes.decoding.generate_chains import GenerateWriter
from reasonrec.recipes.trainers.engine import is_sharded
from reasonrec.recipes.trainers.vllm_chains import VllmWriter, check_vllm
from reasonrec.tokenizers.errors import UserError


def check_chain_engine(name: str, max_chain: int) -> None:
    """Refuse an engine that has nothing to write, or cannot write here, before anything is loaded.

    Args:
        name: `own`, `generate` or `vllm`.
        max_chain: Longest chain; 0 is direct mode.

    Raises:
        UserError: If there are no chains, or the engine cannot work in this launch, or here.
    """
    if name == "own":
        return
    if not max_chain:
        raise UserError(
            f"chain_engine={name} writes chains, and mode=direct has none: set mode=reasoning, or leave it out"
        )
    if is_sharded():
        raise UserError(
            f"chain_engine={name} needs the whole weights in every process, and this launch shares them out (FSDP): "
            "leave chain_engine out, or launch without FSDP"
        )
    if name == "vllm":
        check_vllm()


def chain_writer(name: str, trainer: Any) -> ChainWriter | None:
    """The engine of a training.

    Args:
        name: As in `check_chain_engine`.
        trainer: The trainer, built.

    Returns:
        None for the sampler itself.

    Raises:
        UserError: As `check_chain_engine`.
    """
    check_chain_engine(name, trainer._settings.max_chain)
    if name == "own":
        return None
    if name == "vllm":
        return VllmWriter(trainer)
    return GenerateWriter(trainer._base(), trainer._tokenizer.pad_token_id)
