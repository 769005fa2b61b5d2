"""What a training starts from: a fresh base model, or what an earlier training wrote."""

from __future__ import annotations

from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol

from reasonrec.recipes.models.checkpoint import TRAINED, Setting, base_of
from reasonrec.recipes.models.load import LoraSettings, Method, add_adapter
from reasonrec.recipes.models.precision import Precision, load_finite
from reasonrec.recipes.policies.base import Policy
from reasonrec.recipes.policies.loading import load_fresh, load_trained
from reasonrec.tokenizers.artefact import read_manifest
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.manifest import Manifest
from reasonrec.tokenizers.output import MANIFEST

# What a training that goes on cannot change.
_AGREED = ("method", "history_prompt", "chat", "system", "max_history", "policy", "policy_options", "layers")
_OF_ADAPTERS = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")


def earlier_training(model: str) -> Manifest | None:
    """The manifest of the trained model that `model` names, or None if it names a base model.

    Raises:
        UserError: If it names another artefact of this kit.
    """
    if not (Path(model) / MANIFEST).is_file():
        return None
    manifest = read_manifest(model)
    if manifest.kind not in TRAINED:
        raise UserError(f"model={model} is of kind {manifest.kind!r}: give a base model, or the output of a training")
    return manifest


def agreed_setting(asked: Setting, config: dict[str, Any], earlier: Manifest | None) -> Setting:
    """What the training and all that comes after it agree on.

    Args:
        asked: As the configuration has it, its model in place of the base model.
        config: The configuration.
        earlier: What the training goes on from.

    Raises:
        UserError: If the configuration contradicts what it goes on from.
    """
    moved = config.get("base_model")
    if earlier is None:
        if moved is not None:
            raise UserError(
                f"base_model={moved} says where an adapter's base is now, but model={asked.base_model} is a base "
                "model itself: leave base_model out"
            )
        return asked
    there = Setting.stored(earlier)
    mine = {name: getattr(asked, name) for name in _AGREED}
    theirs = {name: getattr(there, name) for name in _AGREED}
    if earlier.kind == "adapter":
        known = [name for name in _OF_ADAPTERS if name in earlier.config]  # reinforcement learning has no say in them
        mine |= {name: config[name] for name in known}
        theirs |= {name: earlier.config[name] for name in known}
    for name, value in mine.items():
        if value != theirs[name]:
            raise UserError(
                f"{name}={value}, but model={asked.base_model}, which the training goes on from, has {theirs[name]}: "
                f"set {name} to that, or start from a base model"
            )
    return replace(there, one_per_prefix=asked.one_per_prefix, base_model=moved or base_of(earlier, asked.base_model))


class Start(Protocol):
    """The keys that say where a training starts, beside the `lora_…` keys."""

    model: str
    base_model: str | None
    method: Method


def load_start(
    stage: Start,
    setting: Setting,
    policy: Policy,
    earlier: Manifest | None,
    precision: Precision,
    *,
    trust_remote_code: bool = False,
) -> tuple[Any, Setting, Precision]:
    """The model to train, the setting with its base's fingerprint, and what it computes in.

    Args:
        stage: The configuration.
        setting: From `agreed_setting`.
        policy: How it reads and answers.
        earlier: What the training goes on from.
        precision: What to compute in; one in which the model's logits are not finite gives way to fp32.
        trust_remote_code: Run code that comes with the model or its base; off unless the user asks.
    """

    def load(chosen: Precision) -> tuple[Any, Setting]:
        if earlier is not None:
            loaded = load_trained(
                stage.model,
                base_model=stage.base_model,
                precision=chosen,
                trainable=True,
                trust_remote_code=trust_remote_code,
            )
            return loaded.model, setting
        model, fingerprint = load_fresh(setting, policy, chosen, trust_remote_code=trust_remote_code)
        if setting.method != "full":
            model = add_adapter(model, policy.new_tokens, LoraSettings.of(stage))
        return model, replace(setting, fingerprint=fingerprint)

    (model, setting), precision = load_finite(load, precision, itemgetter(0), autocast=stage.method == "full")
    return model, setting, precision
