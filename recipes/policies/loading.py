"""Loading and saving what a policy trains: a fresh base model, or a checkpoint with all that belongs to it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from reasonrec.recipes.models.adapter_config import read_adapter_config
from reasonrec.recipes.models.checkpoint import Setting, base_of, check_base, trained_manifest, trained_tokenizer
from reasonrec.recipes.models.fingerprint import fingerprint
from reasonrec.recipes.models.load import Method, load_base
from reasonrec.recipes.models.precision import Precision, choose
from reasonrec.recipes.policies.base import POLICIES, Policy, build_policy
from reasonrec.tokenizers.artefact import read_manifest
from reasonrec.tokenizers.catalogue import Catalogue
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.manifest import Manifest
from reasonrec.tokenizers.places import own_name
from reasonrec.tokenizers.terminal import shown

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from reasonrec.recipes.rankers.pool import Pool

Quantization = Literal["auto", "4bit"] | None


class Trained(NamedTuple):
    """A checkpoint that was loaded.

    Attributes:
        policy: How it reads and answers.
        model: The model, a `PeftModel` for an adapter.
        setting: What it was trained with.
        manifest: Its manifest.
    """

    policy: Policy
    model: Any
    setting: Setting
    manifest: Manifest


def causal_lm(model: Any) -> Any:
    """The causal LM below PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def loading_method(manifest: Manifest, quantization: Quantization) -> Method:
    """How the weights of a checkpoint, or of its base, are loaded to recommend.

    Args:
        manifest: Its manifest.
        quantization: `auto` (as they were in the training), `4bit`, or None for whole weights.

    Raises:
        UserError: If it is none of these.
    """
    if quantization not in ("auto", "4bit", None):
        raise UserError(f"quantization={shown(quantization)} has to be auto, 4bit or None")
    if quantization == "4bit":
        return "qlora"
    if manifest.kind != "adapter" or (trained := Setting.stored(manifest).method) != "qlora":
        return "lora"  # as they are computed in
    if quantization is None:
        warnings.warn(
            "this adapter was trained on a base in 4 bit and meets whole weights now, so its scores differ from those "
            'of the training: quantization="auto" loads the base as it was',
            stacklevel=3,
        )
        return "lora"
    return trained


def grown_catalogue(catalogue: Catalogue, folder: str | Path, setting: Setting) -> Catalogue:
    """A later version of a checkpoint's catalogue.

    Args:
        catalogue: The checkpoint's own.
        folder: Where the later one is.
        setting: What the checkpoint was trained with.

    Raises:
        UserError: If it is no later version of this one, or the policy has more to learn of an item than its codes.
    """
    if not POLICIES.find(setting.policy).with_codes:
        raise UserError(f"policy {setting.policy} keeps a vector of each item: train it on the new items instead")
    later = Catalogue.load(Path(folder), read_manifest(folder, "catalogue").facts)
    return catalogue.grown_to(later, f"catalogue={folder}")


def load_fresh(
    setting: Setting, policy: Policy, precision: Precision | None = None, *, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, str]:
    """The base model, made ready for a policy, and the fingerprint of its weights."""
    model = load_base(
        setting.base_model,
        method=setting.method,
        precision=precision,
        trust_remote_code=trust_remote_code,
        layers=setting.layers,
    )
    policy.start(model)
    return model, fingerprint(setting.base_model)


def load_trained(
    path: str | Path,
    manifest: Manifest | None = None,
    *,
    base_model: str | None = None,
    precision: Precision | None = None,
    method: Method | None = None,
    trainable: bool = False,
    trust_remote_code: bool = False,
    grown: str | Path | None = None,
) -> Trained:
    """Load a trained model with all that belongs to it, to recommend with or to train on.

    Args:
        path: Folder of the adapter or model.
        manifest: Its manifest, if that was read and verified already: every file is hashed for it.
        base_model: Where an adapter's base model is now; where the training found it by default. A fully trained model
            needs none.
        precision: What is computed in, and where; as the hardware is if unset.
        method: How the weights, or an adapter's base, are loaded; as they were in the training if unset.
        trainable: To train on: its adapter takes gradients, or the whole model is in float32.
        trust_remote_code: Run code that comes with the model or its base. Only the caller says so, never the folder.
        grown: Folder of a later version of its catalogue (`recipes/grow_catalogue.py`).

    Raises:
        UserError: If the base model is not that of the training, or not where it was (the message names the hashes and
            the command that mends it), or the later catalogue is one of other items.
    """
    from peft import PeftModel

    path, precision = Path(path), precision or choose()
    manifest = manifest or trained_manifest(path)
    trained = Setting.stored(manifest)
    setting = replace(trained, base_model=base_model or base_of(manifest, path))
    catalogue = Catalogue.load(path, manifest.facts)
    if grown is not None:
        catalogue = grown_catalogue(catalogue, grown, setting)
    tokenizer = trained_tokenizer(path, manifest, setting, trust_remote_code)
    policy = build_policy(catalogue, setting, tokenizer)
    if manifest.kind == "model":
        method = method or ("full" if trainable else "lora")  # its weights as they are computed in
        model = load_base(str(path), method=method, precision=precision, trust_remote_code=trust_remote_code)
    else:
        base = load_base(
            setting.base_model,
            method=method or setting.method,
            precision=precision,
            trust_remote_code=trust_remote_code,
            layers=setting.layers,
        )
        check_base(manifest, base, setting, trained, trust_remote_code)
        policy.resize(base)
        lora = read_adapter_config(path, setting.base_model)  # PEFT would obey more than that
        model = PeftModel.from_pretrained(base, path, config=lora, is_trainable=trainable)
        lora.target_modules = sorted(lora.target_modules or ())  # a set would be saved in another order each time
    policy.load(path, manifest, causal_lm(model))
    return Trained(policy, model, setting, manifest)


def load_pool(path: Path, manifest: Manifest, policy: Policy, without: Sequence[str] = ()) -> Pool | None:
    """The experts of a checkpoint, if it has some; only then is what they need imported.

    Args:
        path: Its folder.
        manifest: Its manifest.
        policy: Its policy.
        without: Experts that are not to be heard.
    """
    if "pool" not in manifest.facts and not without:
        return None
    from reasonrec.recipes.rankers.pool import Pool

    counts = policy.catalogue.items["train_count"].to_numpy().astype(np.int64)
    return Pool.load(path, manifest.facts, counts, policy.answers.longest, without, policy.catalogue.trained)


def save_checkpoint(folder: Path, setting: Setting, policy: Policy, *, current: bool = True) -> dict[str, Any]:
    """Write what inference needs beside the weights, which are there already.

    Args:
        folder: Where to.
        setting: What training and inference agree on.
        policy: How the model reads and answers.
        current: The weights are those of the model that the policy refreshed last.

    Returns:
        The facts for the manifest; where the base model is stands in the configuration.
    """
    kept = asdict(replace(setting, base_model=own_name(setting.base_model)))
    rows = {"rows": policy.new_tokens[-1] + 1} if policy.new_tokens else {}
    return {"setting": kept, **rows, **policy.save(folder, current=current)}
