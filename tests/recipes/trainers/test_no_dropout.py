"""Whatever dropout an architecture has, and however it keeps it: the trainer scores what the sampler drew from."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from reasonrec.recipes.models.dropout import silence_dropout
from reasonrec.recipes.trainers import item_grpo
from reasonrec.recipes.trainers.item_grpo import ItemGRPOTrainer, RolloutSettings

SHARE = 0.3  # of everything whose name has "drop" in it
HEADS: dict[str, Any] = {"head_dim": 16}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "biogpt": {},
    "cohere": {},
    "cohere2": {},
    "exaone4": {},
    "falcon": {},
    "gemma": HEADS,
    "gemma2": HEADS,
    "gemma3_text": HEADS,
    "glm": HEADS,
    "glm4": HEADS,
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_bigcode": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neox": {},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 16},
    "granite": {},
    "helium": HEADS,
    "llama": {},
    "mistral": HEADS,
    "mixtral": {"num_local_experts": 4, "router_jitter_noise": 0.1},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 64},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "qwen2": {},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 32},
    "qwen3": HEADS,
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, **HEADS},
    "seed_oss": HEADS,
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
    "xglm": {"d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64},
}
WITHOUT_LORA_DROPOUT = ("mixtral", "olmoe", "qwen3_moe")  # PEFT refuses it where experts are one parameter


@pytest.fixture(scope="module", autouse=True)
def _quick_collection():
    gc.freeze()
    yield
    gc.unfreeze()


def make_base(name: str, tiny_base: Path, folder: Path) -> Path:
    """A model of two layers with dropout everywhere that its configuration allows, beside the tiny tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "initializer_range": 0.1,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if hasattr(AutoConfig.for_model(name), "num_key_value_heads"):
        common["num_key_value_heads"] = 2
    config = AutoConfig.for_model(name, **(common | ARCHITECTURES[name]))
    drops = [key for key, value in vars(config).items() if "drop" in key and type(value) in (int, float)]
    assert drops
    for key in drops:
        setattr(config, key, SHARE)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def furthest(trainer: ItemGRPOTrainer) -> float:
    """The largest difference between a log-probability of the trainer and the one that was recorded."""
    trainer.model.train()
    batch = trainer._generate_and_score_completions([{"prompt": ""}] * 16)
    assert trainer.model.training
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    found = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, batch["completion_ids"].shape[1])
    chosen = (batch["tool_mask"] * batch["completion_mask"]).bool()
    return float((found[0].detach() - batch["sampling_per_token_logps"])[chosen].abs().max())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_trainer_scores_what_was_sampled(name, tiny_base, make_kit, make_grpo, tmp_path):
    """LoRA with dropout of its own where PEFT has it, chains and codes, in training mode."""
    base = make_base(name, tiny_base, tmp_path / "base")
    if name in WITHOUT_LORA_DROPOUT:
        kit = make_kit(base, "lora")
    else:
        kit = make_kit(base, "lora", lora_dropout=SHARE)
        assert any(isinstance(m, nn.Dropout) and m.p == SHARE for m in kit.model.modules())
    trainer = make_grpo(base, kit=kit, settings=RolloutSettings(rounds=1, max_chain=4))
    assert furthest(trainer) < 1e-5


def test_with_activation_checkpointing_and_a_reference(tiny_base, make_kit, make_grpo, tmp_path):
    base = make_base("opt", tiny_base, tmp_path / "base")
    kit = make_kit(base, "full")
    kit.model.save_pretrained(tmp_path / "start")  # where TRL finds the reference
    kit.model.config._name_or_path = str(tmp_path / "start")
    options = {"gradient_checkpointing": True, "max_steps": 1, "learning_rate": 0.0, "beta": 0.1}
    trainer = make_grpo(base, kit=kit, **options)
    assert furthest(trainer) < 1e-5
    trainer.ref_model.train()
    trainer.train()
    assert trainer.model.model.decoder.gradient_checkpointing
    assert trainer.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-8)


def test_numbers_are_what_the_difference_is_about(tiny_base, make_grpo, tmp_path, monkeypatch):
    """Without it, dropout that is not a module stays active."""
    monkeypatch.setattr(item_grpo, "silence_dropout", lambda *_: None)
    assert furthest(make_grpo(make_base("llama", tiny_base, tmp_path / "base"), "full")) > 1e-3


def test_a_model_is_saved_with_the_dropout_it_had(tiny_base, make_grpo, tmp_path):
    trainer = make_grpo(make_base("phi", tiny_base, tmp_path / "base"), "full")
    trainer.write_weights(tmp_path / "saved")
    saved = AutoConfig.from_pretrained(tmp_path / "saved")
    assert (saved.attention_dropout, saved.resid_pdrop, saved.embd_pdrop) == (SHARE,) * 3
    assert trainer.model.config.attention_dropout == 0
    assert furthest(trainer) < 1e-5


class _DropPath(nn.Module):
    """As some models write their own."""

    def __init__(self) -> None:
        super().__init__()
        self.prob, self.drop_tokens, self.layerdrop, self.names = 0.5, True, 1, ["dropout"]


def _numbers(module: nn.Module) -> Iterator[Any]:
    yield from (value for name, value in vars(module).items() if name in ("p", "prob", "dropout", "layerdrop"))


def test_every_kind_is_found():
    attention = nn.MultiheadAttention(4, 2, dropout=0.1)
    model = nn.ModuleList([nn.Dropout2d(0.2), nn.AlphaDropout(0.3), attention, nn.GRU(2, 2, 2, dropout=0.4)])
    own = _DropPath()
    silence_dropout(model, own)
    assert [n for module in model for n in _numbers(module)] == [0.0] * 4
    assert (own.prob, own.layerdrop, own.drop_tokens, own.names) == (0.0, 0.0, True, ["dropout"])
