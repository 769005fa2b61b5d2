"""Parallel codes over sixteen items in two categories, on the tiny base model."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

SIZES = (3, 4, 3)


@dataclass
class Made:
    """Policy and model."""

    policy: Any
    model: Any


@pytest.fixture
def make_sets(tiny_base: Path) -> Callable[..., Made]:
    """Builds the same policy and model whenever it is called."""

    def make(*, with_category: bool = True, **options: Any) -> Made:
        from reasonrec.recipes.models.checkpoint import Setting
        from reasonrec.recipes.models.load import load_base
        from reasonrec.recipes.models.precision import choose
        from reasonrec.recipes.policies.base import build_policy
        from reasonrec.tokenizers.catalogue import SCHEMA, Catalogue
        from reasonrec.tokenizers.index import build_index

        every = np.array(list(itertools.product(*map(range, SIZES))))
        codes = np.random.default_rng(2).permutation(every)[:16]
        rows = [
            dict.fromkeys(SCHEMA, "")
            | {"item_id": f"i{n}", "title": f"oak lamp {n}", "train_count": n}
            | ({"category": ["Lamps > Oak", "Kettles"][n % 2] if n else ""} if with_category else {})
            for n in range(16)
        ]
        catalogue = Catalogue(pl.DataFrame(rows, schema=SCHEMA), "sixteen items", mask_history=False, dataset="")
        setting = Setting(
            str(tiny_base), "full", "History:{history}", False, None, 5, policy="parallel_codes",
            policy_options=options,
        )  # fmt: skip
        policy = build_policy(catalogue.with_codes(build_index(codes, SIZES)), setting)
        torch.manual_seed(0)
        model = load_base(str(tiny_base), method="full", precision=choose("fp32", "cpu"))
        policy.start(model)
        with torch.no_grad():  # logits far from equal, so that an order means something
            model.get_input_embeddings().weight[policy.vocabulary.first_id :] *= 8
        return Made(policy, model.eval())

    return make
