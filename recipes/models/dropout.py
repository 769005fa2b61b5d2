"""No dropout while log-probabilities are computed: what was sampled and what is optimised must be one policy.

Dropout is not always a module. Llama and its kin keep a number and hand it to the attention kernel while training, OPT
and XGLM one for whole layers, some read their configuration at run time. All of them are set to 0, once. Evaluation
mode would do it too, and would turn activation checkpointing off with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

_JITTER = ("jitter_noise", "input_jitter_noise")  # what mixtures of experts multiply inputs with while training
_OF_MODULES = ("p", "prob", "rate")  # what a module that is called dropout may call its share


@dataclass(frozen=True)
class Silenced:
    """What was set to 0.

    Attributes:
        entries: Object, name of the attribute, and its value before.
    """

    entries: list[tuple[Any, str, float]]

    @contextmanager
    def configured(self) -> Iterator[None]:
        """Let the configurations say for a while what they said before: a model that is saved keeps its dropout."""
        configs = [entry for entry in self.entries if isinstance(entry[0], PreTrainedConfig)]
        try:
            for config, name, value in configs:
                setattr(config, name, value)
            yield
        finally:
            for config, name, _ in configs:
                setattr(config, name, 0.0)


def silence_dropout(*models: nn.Module) -> Silenced:
    """Set every dropout of some models to 0: modules, numbers on modules, and entries of their configurations.

    Args:
        models: Models, or wrappers of them (PEFT, DDP); training mode and adapters' configurations are left alone.
    """
    entries: list[tuple[Any, str, float]] = []
    for model in models:
        for module in model.modules():
            called_so = "drop" in type(module).__name__.lower()
            _silence(module, entries, _OF_MODULES if called_so else ())
            config = vars(module).get("config")
            if isinstance(config, PreTrainedConfig):
                _silence_config(config, entries)
    return Silenced(entries)


def _silence_config(config: PreTrainedConfig, entries: list[tuple[Any, str, float]]) -> None:
    _silence(config, entries)
    for part in vars(config).values():
        if isinstance(part, PreTrainedConfig):
            _silence_config(part, entries)


def _silence(owner: Any, entries: list[tuple[Any, str, float]], more: tuple[str, ...] = ()) -> None:
    for name, value in list(vars(owner).items()):
        named = "drop" in name or name in _JITTER or name in more
        if named and isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1:
            entries.append((owner, name, value))
            setattr(owner, name, 0.0)
