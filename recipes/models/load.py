"""Load a base model with the code tokens: full precision or 4 bit, from the Hub, a folder, or an installed package."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from reasonrec.recipes.keys import nearest
from reasonrec.recipes.models.precision import Precision, choose
from reasonrec.recipes.models.quantized import keep_unpacked, nf4, prepare_4bit
from reasonrec.tokenizers.environment import is_first_process
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.model_folder import TRUST_REMEDY, check_model_folder
from reasonrec.tokenizers.places import own_name
from reasonrec.tokenizers.rows import text_rows
from reasonrec.tokenizers.terminal import say, shown
from reasonrec.tokenizers.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Method = Literal["full", "lora", "qlora"]
PACKAGE = "package:"
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # what else it says is a folder


@dataclass(frozen=True)
class LoraSettings:
    """LoRA's usual knobs.

    Attributes:
        r: Rank.
        alpha: Scaling; the update is multiplied by alpha / r.
        dropout: Dropout in front of A.
        target_modules: Module names, or `all-linear`.
    """

    r: int
    alpha: int
    dropout: float
    target_modules: str | list[str]

    @classmethod
    def of(cls, stage: Any) -> LoraSettings:
        """The `lora_…` keys of a stage, target modules as `all-linear` or as names joined by commas."""
        words = stage.lora_target_modules
        targets = words if words == "all-linear" else [name.strip() for name in words.split(",")]
        return cls(stage.lora_r, stage.lora_alpha, stage.lora_dropout, targets)


def is_hub_id(reference: str) -> bool:
    """Whether a reference is a model's name on the Hub, and no folder that is here."""
    return _HUB_ID.fullmatch(reference) is not None and not Path(reference).exists()


def resolve_model(reference: str) -> str:
    """Turn a model reference into something `from_pretrained` takes.

    `package:NAME` means the GGUF file that an installed Python package carries; it is de-quantised once into the cache
    folder (`$REASONREC_CACHE`, by default `~/.cache/reasonrec`), because 4-bit loading needs ordinary weights.

    Args:
        reference: Hub id, folder, or `package:NAME`.

    Raises:
        UserError: If the package is not installed or carries no GGUF file, or a folder is not there.
    """
    if not reference.startswith(PACKAGE):
        if not _HUB_ID.fullmatch(reference) and not Path(reference).exists():
            raise UserError(
                f"model={reference}: there is no folder {Path(reference).absolute()} (a Hub id, a local folder, or "
                "package:NAME)"
            )
        return reference
    name = reference.removeprefix(PACKAGE)
    # Found, not imported: such packages need libraries that this kit does not; a dotted name would import its parents.
    try:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
    except ValueError:  # a module that runs without having been found, such as __main__
        spec = None
    # A package is a folder of its own; beside a single file, everything that is installed lies.
    if spec is None or spec.origin is None or Path(spec.origin).name != "__init__.py":
        raise UserError(
            f"model={reference}: the Python package {name} is not installed; `make install` brings the demo's"
        )
    files = sorted(Path(spec.origin).parent.rglob("*.gguf"))
    if not files:
        raise UserError(f"model={reference}: the package carries no GGUF file")
    source = files[0]
    root = Path(os.environ.get("REASONREC_CACHE") or Path.home() / ".cache" / "reasonrec")
    target = root / f"{source.stem}-{source.stat().st_size}"
    if (target / "config.json").is_file():
        return str(target)
    work = target.with_name(f"{target.name}.{os.getpid()}.partial")
    shutil.rmtree(work, ignore_errors=True)
    _convert_gguf(source, work)
    try:
        work.rename(target)
    except OSError:  # another process was faster
        shutil.rmtree(work, ignore_errors=True)
    return str(target)


def _convert_gguf(source: Path, target: Path) -> None:
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    say(f"unpacking {source.name} (once) …")
    # Stored in bf16, as it was published, on every machine; what it is computed in is decided when it is loaded.
    file, folder = source.name, source.parent
    options: dict[str, Any] = {"gguf_file": file, "dtype": torch.bfloat16}
    if hasattr(transformers, "GgufConfig"):  # newer versions keep the weights packed where they have kernels for it
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, **options)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file, trust_remote_code=False)
    # What is left of GGUF would make `save_pretrained` refuse.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.config._name_or_path = ""
    target.mkdir(parents=True)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def load_tokenizer(reference: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Tokenizer of a base model, with a padding token: its own, or the token that ends answers.

    Args:
        reference: Hub id, folder, or `package:NAME`.
        trust_remote_code: Run code that comes with it; off unless the user asks.

    Raises:
        UserError: If it cannot be loaded, or has no token that ends answers.
    """
    from transformers import AutoTokenizer

    tokenizer = _from_pretrained(AutoTokenizer, resolve_model(reference), trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        own = ", ".join(list(tokenizer.get_added_vocab())[:4]) or "one of its words"
        raise UserError(
            f'model={reference}: the tokenizer has no eos token, which ends answers: set "eos_token" in its '
            f"tokenizer_config.json to one of its tokens (it has {own}), or take another model"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(
    reference: str,
    *,
    method: Method,
    precision: Precision | None = None,
    trust_remote_code: bool = False,
    layers: int | None = None,
) -> PreTrainedModel:
    """Load the causal LM.

    Args:
        reference: Hub id, folder, or `package:NAME`.
        method: `qlora` loads NF4 with double quantisation; `full` loads float32 for training.
        precision: What is computed in, and where; as the hardware is if unset.
        trust_remote_code: Run code that comes with the model; off unless the user asks.
        layers: Only so many of its layers, from the first one on; all by default.

    Raises:
        UserError: If it cannot be loaded, or does not have as many layers.
    """
    from transformers import AutoModelForCausalLM

    precision = precision or choose()
    options: dict[str, Any] = {"dtype": precision.weights(method), "use_safetensors": True}  # never a pickle
    if method == "qlora":
        # Quantise here: trainers ignore `quantization_config` when they are given a model instance.
        options["quantization_config"] = nf4(precision.dtype)
        if precision.device.type != "cpu":
            options["device_map"] = {"": precision.device}
    where = resolve_model(reference)
    if layers is not None:
        options["config"] = _cut_config(where, layers, trust_remote_code)
    with contextlib.nullcontext() if layers is None else _silent():  # of all weights that are not loaded, a line each
        model = _from_pretrained(AutoModelForCausalLM, where, trust_remote_code=trust_remote_code, **options)
    model.name_or_path = own_name(reference)  # what an adapter remembers, and publishes: no folder of this machine
    if method == "qlora" and (done := prepare_4bit(model, precision)) and is_first_process():
        say(done)
    return model


def _cut_config(where: str, layers: int, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    config = _from_pretrained(AutoConfig, where, trust_remote_code=trust_remote_code)
    text = config.get_text_config()
    if layers > text.num_hidden_layers:
        raise UserError(
            f"layers={layers}, but model={where} has {text.num_hidden_layers}: lower layers, or leave it out"
        )
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return config


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _from_pretrained(auto: Any, path: str, *, trust_remote_code: bool, **options: Any) -> Any:
    try:
        if not trust_remote_code:
            _check_alone(path)
        # Explicit, or transformers would ask on a terminal.
        return auto.from_pretrained(path, trust_remote_code=trust_remote_code, **options)
    except UserError:
        raise
    except (OSError, ValueError) as error:  # ValueError: no config.json, an unknown architecture, code of its own
        first = TRUST_REMEDY if "trust_remote_code" in str(error) else str(error).splitlines()[0]
        if not Path(path).exists():  # what the Hub says of a folder's name helps nobody by itself
            first = f"there is no folder {Path(path).absolute()}, and the Hub did not give it either: {first}"
        raise UserError(f"model={path}: {first} (a Hub id, a local folder, or package:NAME)") from error


def _check_alone(path: str) -> None:
    """Check that a model leads to nothing but itself.

    Raises:
        UserError: If it does.
        OSError: If the Hub does not answer.
    """
    from transformers.utils.peft_utils import find_adapter_config_file

    if Path(path).is_dir():
        check_model_folder(Path(path))
    elif find_adapter_config_file(path) is not None:
        raise UserError(f"model={path} is an adapter of another model: give a model that stands by itself")


def add_code_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: Vocabulary,
    codes: np.ndarray,
    texts: Sequence[str],
) -> None:
    """Make room for the code tokens and start their rows from the items' text.

    Args:
        model: The base model; its embeddings are resized in place if they are too short.
        tokenizer: Its tokenizer, with the code tokens.
        vocabulary: Where the code tokens stand.
        codes: (items, levels) codes, -1 where an item has none.
        texts: Text of each item.
    """
    embedding = model.get_input_embeddings().weight
    rows = text_rows(embedding, tokenizer, vocabulary, codes, texts)
    resize(model, vocabulary)
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.weight[vocabulary.begin_id : vocabulary.size] = rows.to(module.weight)


def resize(model: PreTrainedModel, vocabulary: Vocabulary) -> None:
    """Give the embeddings as many rows as the vocabulary needs; some models have spare ones already."""
    if model.get_input_embeddings().weight.shape[0] < vocabulary.size:
        model.resize_token_embeddings(vocabulary.size, mean_resizing=False)


def add_adapter(model: PreTrainedModel, new_tokens: Sequence[int], settings: LoraSettings) -> Any:
    """Wrap the model with LoRA and trainable rows of new tokens, all of them in float32.

    Args:
        model: The base model with its new rows.
        new_tokens: Token ids whose rows train.
        settings: LoRA's knobs.

    Returns:
        The `PeftModel`.

    Raises:
        UserError: If a target module is none of the model's.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    targets = settings.target_modules
    if not isinstance(targets, str):  # PEFT takes a text for a pattern of whole paths
        targets = [_known_module(model, name) for name in targets]
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    ids = list(new_tokens)
    # Tied heads follow the embedding; an untied head needs rows of its own.
    rows: Any = (
        ids
        if tied
        else {_module_name(model, m): ids for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    )
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        trainable_token_indices=rows if ids else None,
    )
    peft_model = get_peft_model(model, config)
    chosen = peft_model.peft_config["default"]
    chosen.target_modules = sorted(chosen.target_modules)  # a set would be saved in another order each time
    trainable_to_float32(peft_model)
    return peft_model


def _known_module(model: PreTrainedModel, wanted: str) -> str:
    """The name of a kind of layers, or the end of a path, as PEFT matches them."""
    paths = [path for path, module in model.named_modules() if not list(module.children())]
    if not any(path == wanted or path.endswith(f".{wanted}") for path in paths):
        kinds = sorted({path.rsplit(".", 1)[-1] for path in paths})
        raise UserError(
            f"lora_target_modules: the model has no layer {shown(wanted)}{nearest(wanted, kinds)} (all-linear takes "
            "every linear layer)"
        )
    return wanted


def _module_name(model: PreTrainedModel, module: torch.nn.Module) -> str:
    return next(name.rsplit(".", 1)[-1] for name, candidate in model.named_modules() if candidate is module)


def trainable_to_float32(model: torch.nn.Module) -> None:
    """At small learning rates most bf16 updates round to nothing, so whatever trains is kept in float32."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def trainable_values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of what trains, by name, to put back after TRL has rounded it."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def restore_trainable(model: torch.nn.Module, start: dict[str, torch.Tensor]) -> None:
    """Undo what TRL does to a model on a 4-bit base: what trains is float32 again, with the values it had.

    Args:
        model: The model in the trainer.
        start: `trainable_values` from before the trainer was built.
    """
    trainable_to_float32(model)
    keep_unpacked(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in start:
                parameter.copy_(start[name])
