"""What training and inference share, and how it is loaded: setting, catalogue, tokenizer, model.

Everything that could differ between the two is here: the tokenizer with the code tokens, the trie, the prompt and the
longest history. Training writes its `Setting` and the catalogue into the checkpoint, inference reads them back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import numpy as np

from reasonrec.data_gen.schema import Dataset
from reasonrec.data_gen.tasks.prompts import Prompter, Prompts, check_history_prompt
from reasonrec.data_gen.tasks.reasoning import Mention, TraceChains
from reasonrec.data_gen.tasks.render import Examples
from reasonrec.recipes.keys import fit
from reasonrec.recipes.models.adapter_config import read_adapter_config
from reasonrec.recipes.models.fingerprint import fingerprint, fingerprint_like
from reasonrec.recipes.models.load import Method, add_code_rows, load_base, load_tokenizer, resize
from reasonrec.recipes.models.precision import Precision, choose
from reasonrec.tokenizers.artefact import check_input, read_manifest
from reasonrec.tokenizers.catalogue import Catalogue
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.index import ItemIndex
from reasonrec.tokenizers.manifest import Manifest
from reasonrec.tokenizers.places import located, own_name
from reasonrec.tokenizers.terminal import shown
from reasonrec.tokenizers.trie import Trie
from reasonrec.tokenizers.vocabulary import Vocabulary

if TYPE_CHECKING:
    import polars as pl
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from reasonrec.data_gen.reasoning.traces import Trace


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
    """

    base_model: str
    method: Method
    history_prompt: str
    chat: bool
    system: str | None
    max_history: int
    one_per_prefix: bool = False
    fingerprint: str = ""

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
                if isinstance(error, KeyError) and item.default is not MISSING:
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


@dataclass(frozen=True)
class Bundle:
    """Catalogue and tokenizer as one: turns items into tokens and back.

    Attributes:
        catalogue: The items and their codes.
        tokenizer: The LLM's tokenizer with the code tokens.
        vocabulary: Where they stand.
        trie: Trie of all items.
        prompts: How histories are read.
    """

    catalogue: Catalogue
    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    trie: Trie
    prompts: Prompts = field(repr=False)

    @classmethod
    def build(
        cls,
        catalogue: Catalogue,
        setting: Setting,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        trust_remote_code: bool = False,
    ) -> Bundle:
        """Glue catalogue and base model together.

        Args:
            catalogue: The items and their codes.
            setting: What training and inference agree on.
            tokenizer: The tokenizer, with or without the code tokens; the base model's by default.
            trust_remote_code: Run code that comes with the base model; off unless the user asks.

        Raises:
            UserError: If the items have no codes.
        """
        index = catalogue.codes
        if tokenizer is None:
            tokenizer = load_tokenizer(setting.base_model, trust_remote_code=trust_remote_code)
        vocabulary = Vocabulary.extend(tokenizer, index.level_sizes)
        prompts = Prompts(
            Prompter(tokenizer, chat=setting.chat, system=setting.system),
            setting.history_prompt,
            vocabulary.item_token_ids(index.codes),
            vocabulary.begin_id,
            tokenizer.eos_token_id,
        )
        return cls(catalogue, tokenizer, vocabulary, Trie.from_codes(index.codes, index.level_sizes), prompts)

    @property
    def index(self) -> ItemIndex:
        """The codes."""
        return self.catalogue.codes

    def examples(
        self, train: pl.DataFrame, *, one_per_prefix: bool, traces: Sequence[Trace] = (), mention: Mention = "codes"
    ) -> Examples:
        """What renders training examples.

        Args:
            train: The dataset's training sequences.
            one_per_prefix: Put the loss on answers alone.
            traces: Reasoning traces, for the tasks that are made of them.
            mention: How their chains name items.
        """
        titles = self.catalogue.titles
        return Examples(
            self.prompts,
            [np.asarray(items) for items in train["items"].to_list()],
            titles,
            self.catalogue.texts("category", "brand", joined=" "),
            one_per_prefix,
            chains=TraceChains(self.prompts, titles, traces, mention) if traces else None,
        )


def load_with_rows(
    setting: Setting, bundle: Bundle, precision: Precision | None = None, *, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, str]:
    """The base model with freshly started code rows, and the fingerprint of its weights."""
    model = load_base(
        setting.base_model, method=setting.method, precision=precision, trust_remote_code=trust_remote_code
    )
    add_code_rows(
        model,
        bundle.tokenizer,
        bundle.vocabulary,
        bundle.index.codes,
        bundle.catalogue.texts("title", "category", "brand"),
    )
    return model, fingerprint(setting.base_model)


def load_trained(
    path: str | Path,
    *,
    base_model: str | None = None,
    precision: Precision | None = None,
    trainable: bool = False,
    trust_remote_code: bool = False,
) -> tuple[Bundle, Any, Setting, Manifest]:
    """Load a trained model with all that belongs to it, to recommend with or to train on.

    Args:
        path: Folder of the adapter or model.
        base_model: Where an adapter's base model is now; where the training found it by default. A fully trained model
            needs none.
        precision: What is computed in, and where; as the hardware is if unset.
        trainable: To train on: its adapter takes gradients, or the whole model is in float32.
        trust_remote_code: Run code that comes with the model or its base. Only the caller says so, never the folder.

    Returns:
        Catalogue and tokenizer; the model (a `PeftModel` for an adapter); what it was trained with; its manifest.

    Raises:
        UserError: If the base model is not that of the training, or not where it was; the message names the hashes and
            the command that mends it.
    """
    from peft import PeftModel

    path, precision = Path(path), precision or choose()
    manifest = read_manifest(path)
    if manifest.kind not in ("adapter", "model"):
        raise UserError(f"{path} is a {manifest.kind}, not a trained model: give the output folder of recipes/sft.py")
    trained = Setting.stored(manifest)
    setting = replace(trained, base_model=base_model or base_of(manifest, path))
    catalogue = Catalogue.load(path, manifest.facts)
    bundle = Bundle.build(catalogue, setting, trained_tokenizer(path, manifest, setting, trust_remote_code))
    if manifest.kind == "model":
        method: Method = "full" if trainable else "lora"  # its weights as they are computed in
        whole = load_base(str(path), method=method, precision=precision, trust_remote_code=trust_remote_code)
        return bundle, whole, setting, manifest
    base = load_base(
        setting.base_model, method=setting.method, precision=precision, trust_remote_code=trust_remote_code
    )
    check_base(manifest, base, setting, trained, trust_remote_code)
    resize(base, bundle.vocabulary)
    lora = read_adapter_config(path, setting.base_model)  # PEFT would obey more than that
    model = PeftModel.from_pretrained(base, path, config=lora, is_trainable=trainable)
    lora.target_modules = sorted(lora.target_modules or ())  # a set would be saved in another order each time
    return bundle, model, setting, manifest


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
            raise UserError(f"this {manifest.kind} does not say where its dataset is: {remedy}")
        if not Path(dataset := located(found, path)).exists():
            raise UserError(f"{path} was trained with the dataset at {shown(dataset)}, where nothing is now: {remedy}")
    data = Dataset.load(dataset)
    check_input(manifest, "dataset", data.manifest, OTHER)
    return data


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
        raise UserError(
            f"this {manifest.kind} was trained on base weights {trained.fingerprint[:12]}… ({trained.base_model}), "
            f"but the base loaded now has {actual[:12]}…: load {trained.base_model} in the same revision, or train "
            "again"
        )


def save_setting(folder: Path, setting: Setting, bundle: Bundle) -> dict[str, Any]:
    """Write what inference needs beside the weights: tokenizer, catalogue, codes.

    Returns:
        The facts for the manifest; where the base model is stands in the configuration.
    """
    bundle.tokenizer.save_pretrained(folder)
    kept = asdict(replace(setting, base_model=own_name(setting.base_model)))
    return {"setting": kept, "rows": bundle.vocabulary.size, **bundle.catalogue.save(folder)}
