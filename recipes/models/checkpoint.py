"""What a checkpoint says of itself: what training and inference agree on, and what it was made of."""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from reasonrec.data_gen.schema import Dataset
from reasonrec.data_gen.tasks.prompts import check_history_prompt
from reasonrec.recipes.keys import fit
from reasonrec.recipes.models.fingerprint import fingerprint_like
from reasonrec.recipes.models.load import Method, load_tokenizer
from reasonrec.tokenizers.artefact import check_input, read_manifest
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.manifest import Manifest
from reasonrec.tokenizers.places import located, own_name
from reasonrec.tokenizers.terminal import shown

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TRAINED = ("adapter", "model")  # kinds of artefacts that recommend
OTHER = "pass the one it was trained with, or train again with recipes/sft.py"


@dataclass(frozen=True)
class Setting:
    """What training and inference have to agree on.

    Attributes:
        base_model: Reference of the base model.
        method: How it was trained: full, lora or qlora.
        history_prompt: Template of histories.
        chat: Whether prompts go through the chat template.
        system: System message of the chat template.
        max_history: Longest history in items.
        one_per_prefix: Whether only answers were supervised.
        fingerprint: Fingerprint of the base model's weights.
        policy: Name of the policy.
        policy_options: The policy's own options.
        layers: How many layers of the base model are used, from the first one on; None for all.
    """

    base_model: str
    method: Method
    history_prompt: str
    chat: bool
    system: str | None
    max_history: int
    one_per_prefix: bool = False
    fingerprint: str = ""
    policy: str = "semantic_id"
    policy_options: dict[str, Any] = field(default_factory=dict)
    layers: int | None = None

    @classmethod
    def stored(cls, manifest: Manifest) -> Setting:
        """What a trained model says of itself. Whether code may run is not its to say: older ones named that, too.

        Args:
            manifest: Manifest of the adapter or model.

        Raises:
            UserError: If it says something that no training of this kit writes.
        """
        kinds, found = get_type_hints(cls), manifest.facts.get("setting")
        values = {}
        for item in fields(cls):
            try:
                values[item.name] = fit(kinds[item.name], found[item.name])  # type: ignore[index]
            except (TypeError, KeyError) as error:
                if isinstance(error, KeyError) and (item.default, item.default_factory) != (MISSING, MISSING):
                    continue  # older than this key
                has = shown(found[item.name]) if isinstance(found, dict) and item.name in found else "nothing"
                raise UserError(
                    f"the setting of this {manifest.kind} has {has} as {item.name}, which no training of this kit "
                    "writes: train it again with recipes/sft.py"
                ) from error
        check_history_prompt(values["history_prompt"])
        if values["max_history"] < 1:
            raise UserError(f"the setting of this {manifest.kind} has max_history={values['max_history']}: below 1")
        return cls(**values)


def training_data(manifest: Manifest, path: str | Path, dataset: str | Path | None = None) -> Dataset:
    """The dataset of a trained model, to go on training on; recommending needs none.

    Args:
        manifest: The model's manifest.
        path: Its folder.
        dataset: Where its dataset is now; where its training found it by default.

    Raises:
        UserError: If it is not there, or another one.
    """
    found, remedy = manifest.config.get("dataset"), "pass --dataset PATH"
    if dataset is None:
        if not isinstance(found, str):
            raise UserError(
                f"{path} holds no dataset, and this {manifest.kind} does not say where its dataset is: {remedy}"
            )
        if not Path(dataset := located(found, path)).exists():
            raise UserError(f"{path} was trained with the dataset at {shown(dataset)}, where nothing is now: {remedy}")
    data = Dataset.load(dataset)
    check_input(manifest, "dataset", data.manifest, OTHER)
    return data


def training_index(manifest: Manifest, path: str | Path, index: str | None = None) -> str | None:
    """Where the item index of a trained model is, if it says so: a checkpoint has its codes, but not their vectors.

    Args:
        manifest: The model's manifest.
        path: Its folder.
        index: Where its index is now; where its training found it by default.
    """
    found = manifest.config.get("index")
    return index or (located(found, path) if isinstance(found, str) else None)


def trained_manifest(path: str | Path) -> Manifest:
    """Read and verify the manifest of a trained model.

    Raises:
        UserError: If it is another artefact, or as `read_manifest`.
    """
    manifest = read_manifest(path)
    if manifest.kind not in TRAINED:
        raise UserError(f"{path} is a {manifest.kind}, not a trained model: give the output folder of recipes/sft.py")
    return manifest


def trained_tokens(path: str | Path) -> int:
    """How many tokens the last training of a checkpoint processed; 0 if it does not say."""
    file = Path(path) / "train_metrics.json"
    log = json.loads(file.read_text(encoding="utf-8"))["log"] if file.exists() else []
    return int(max((entry.get("num_tokens", 0) for entry in log), default=0))


def base_of(manifest: Manifest, folder: str | Path) -> str:
    """The base model of a trained model: a Hub id, `package:NAME`, or where its folder is seen from here.

    Args:
        manifest: Its manifest.
        folder: Folder of the trained model.
    """
    found = manifest.config.get("base_model")
    return located(found if isinstance(found, str) else Setting.stored(manifest).base_model, folder)


def trained_tokenizer(
    path: str | Path, manifest: Manifest, setting: Setting, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a trained model: an adapter's base has it, a fully trained model its own.

    Args:
        path: Folder of the adapter or model.
        manifest: Its manifest.
        setting: What it was trained with, and where the base is now.
        trust_remote_code: As for `load_trained`.

    Raises:
        UserError: If the base is not where it was.
    """
    if manifest.kind == "model":
        return load_tokenizer(str(path), trust_remote_code=trust_remote_code)
    try:
        return load_tokenizer(setting.base_model, trust_remote_code=trust_remote_code)
    except UserError as error:
        raise UserError(
            f"{path} is an adapter of the base model {setting.base_model}, which does not load; if it moved, pass "
            f"--base_model PATH (base_model= in Python): {error}"
        ) from error


def check_base(
    manifest: Manifest, base: PreTrainedModel, setting: Setting, trained: Setting, trust_remote_code: bool = False
) -> None:
    """Check that an adapter meets the base model it was trained on.

    Args:
        manifest: The adapter's.
        base: The base model.
        setting: Where it was loaded from.
        trained: What the adapter was trained with.
        trust_remote_code: As the base was loaded.

    Raises:
        UserError: If the weights differ; the message gives both fingerprints and the reference used in training.
    """
    actual = fingerprint_like(trained.fingerprint, base, setting.base_model, trust_remote_code=trust_remote_code)
    if actual != trained.fingerprint:
        revision = manifest.config.get("base_revision")
        named = trained.base_model + (f" in revision {shown(revision)}" if revision else "")
        raise UserError(
            f"this {manifest.kind} was trained on base weights {trained.fingerprint[:12]}… ({named}), but the base "
            f"loaded now has {actual[:12]}… ({own_name(setting.base_model)}): load {trained.base_model} in the same "
            "revision, or train again"
        )
