"""A dual head over seven items with titles, on the tiny base model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

TITLES = ["small oak lamp", "steel kettle", "velvet backpack", "bamboo novel", "marble tent", "a scarf", "a drill"]
COUNTS = [3, 9, 1, 4, 4, 2, 7]


@dataclass
class Made:
    """Policy and model."""

    policy: Any
    model: Any

    @property
    def base(self) -> Any:
        """The causal LM below PEFT's wrapper."""
        from reasonrec.recipes.policies.loading import causal_lm

        return causal_lm(self.model)


@pytest.fixture
def make_head(tiny_base: Path) -> Callable[..., Made]:
    """Builds the same policy and model whenever it is called; with LoRA as trained before."""

    def make(method: str = "full", *, history_prompt: str = "History:{history}", **options: Any) -> Made:
        from reasonrec.recipes.models.checkpoint import Setting
        from reasonrec.recipes.models.load import LoraSettings, add_adapter, load_base
        from reasonrec.recipes.models.precision import choose
        from reasonrec.recipes.policies.base import build_policy
        from reasonrec.tokenizers.catalogue import SCHEMA, Catalogue

        rows = [
            dict.fromkeys(SCHEMA, "") | {"item_id": f"i{n}", "title": title, "train_count": count}
            for n, (title, count) in enumerate(zip(TITLES, COUNTS, strict=True))
        ]
        catalogue = Catalogue(pl.DataFrame(rows, schema=SCHEMA), "seven items", mask_history=False, dataset="")
        setting = Setting(
            str(tiny_base), method, history_prompt, False, None, 5, policy="dual_head", policy_options=options
        )
        policy = build_policy(catalogue, setting)
        torch.manual_seed(0)
        model = load_base(str(tiny_base), method=method, precision=choose("fp32", "cpu"))
        policy.start(model)
        if method != "full":
            model = add_adapter(model, policy.new_tokens, LoraSettings(4, 8, 0.0, "all-linear"))
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter += 0.02 * torch.randn_like(parameter)
        made = Made(policy, model.eval())
        policy.refresh(made.base)
        return made

    return make
