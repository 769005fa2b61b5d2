"""A catalogue of seven items, a model that knows nothing about them, and everything a GRPO trainer is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from transformers import set_seed

SIZES = (3, 4, 2)
# An item below every kind of prefix: a disambiguation code, a first code with one item, codes without an alternative.
CODES = np.array([[0, 0, 0], [0, 0, 1], [0, 2, -1], [1, 3, -1], [1, 1, -1], [2, 1, -1], [2, 3, -1]])
TEXTS = ["small oak lamp", "steel kettle", "velvet backpack", "bamboo novel", "marble tent", "a scarf", "a drill"]


def policy_of(tokenizer: Any, vocabulary: Any, codes: np.ndarray, texts: list[str]) -> Any:
    """Semantic IDs of a catalogue that stands in no dataset."""
    from reasonrec.data_gen.tasks.prompts import Prompter, Prompts
    from reasonrec.recipes.policies.semantic_id import CodeAnswers, SemanticIds
    from reasonrec.tokenizers.catalogue import SCHEMA, Catalogue
    from reasonrec.tokenizers.index import ItemIndex
    from reasonrec.tokenizers.trie import Trie

    rows = [dict.fromkeys(SCHEMA, "") | {"item_id": text, "title": text, "train_count": 1} for text in texts]
    items = Catalogue(pl.DataFrame(rows, schema=SCHEMA), "seven items", mask_history=False, dataset="")
    index = ItemIndex(codes.astype(np.int32), vocabulary.level_sizes)
    ids = vocabulary.item_token_ids(codes)
    prompts = Prompts(Prompter(tokenizer), "History:{history}", ids, vocabulary.begin_id, tokenizer.eos_token_id)
    answers = CodeAnswers(Trie.from_codes(codes, vocabulary.level_sizes), vocabulary)
    return SemanticIds(items.with_codes(index), tokenizer, prompts, answers)


@dataclass
class Kit:
    """Model, tokenizer and what belongs to them."""

    model: Any
    tokenizer: Any
    vocabulary: Any
    trie: Any
    index: Any

    @property
    def base(self) -> Any:
        """The causal LM below PEFT's wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model

    @cached_property
    def policy(self) -> Any:
        """All of it as a policy."""
        return policy_of(self.tokenizer, self.vocabulary, CODES, TEXTS)

    @property
    def close_ids(self) -> tuple[int, ...]:
        return tuple(self.tokenizer("</think>", add_special_tokens=False)["input_ids"])

    def prompt(self, history, *, reasoning: bool = False) -> list[int]:
        ids = self.vocabulary.item_token_ids(CODES)
        opening = self.tokenizer("<think>", add_special_tokens=False)["input_ids"]
        start = self.tokenizer("History:", add_special_tokens=False)["input_ids"]
        return [*start, *(t for i in history for t in ids[i]), *(opening if reasoning else [self.vocabulary.begin_id])]


@dataclass
class Problem:
    """Histories with targets: what comes next is a function of the last item."""

    prompts: int = 24
    seed: int = 0
    permuted: bool = False
    rewards: dict[str, Any] = field(default_factory=lambda: {"exact": 1.0})


@pytest.fixture(autouse=True)
def _four_bit(expanded_at_every_step: None) -> None:
    """What is said of qlora here is said of 4-bit weights; that expanding them once changes nothing is one test."""


@pytest.fixture(name="policy_of", scope="session")
def _policy_of() -> Callable[..., Any]:
    """The function, for tests that make a model of their own."""
    return policy_of


def kit_of(base: Path, method: str = "full", scale: float = 1.0, lora_dropout: float = 0.0) -> Kit:
    """The same model whenever it is called: `full`, `lora` or `qlora`, adapters as trained before."""
    from reasonrec.recipes.models.load import LoraSettings, add_adapter, add_code_rows, load_base, load_tokenizer
    from reasonrec.recipes.models.precision import choose
    from reasonrec.tokenizers.index import ItemIndex
    from reasonrec.tokenizers.trie import Trie
    from reasonrec.tokenizers.vocabulary import Vocabulary

    set_seed(0)
    tokenizer = load_tokenizer(str(base))
    vocabulary = Vocabulary.extend(tokenizer, SIZES)
    model = load_base(str(base), method=method, precision=choose("fp32", "cpu"))
    add_code_rows(model, tokenizer, vocabulary, CODES, TEXTS)
    with torch.no_grad():  # rows far enough apart that choices are not all alike
        model.get_input_embeddings().weight[vocabulary.first_id :] *= 1 + 6 * scale
    if method != "full":
        model = add_adapter(model, vocabulary.token_ids, LoraSettings(4, 8, lora_dropout, "all-linear"))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.02 * torch.randn_like(parameter)
    index = ItemIndex(CODES.astype(np.int32), SIZES)
    return Kit(model, tokenizer, vocabulary, Trie.from_codes(CODES, SIZES), index)


@pytest.fixture
def make_kit() -> Callable[..., Kit]:
    """The function, for tests."""
    return kit_of


@pytest.fixture
def make_grpo(make_kit, tmp_path) -> Callable[..., Any]:
    """Builds a trainer on the small catalogue."""

    def make(
        base: Path, method: str = "full", *, problem: Problem | None = None, scale: float = 1.0, **options: Any
    ) -> Any:
        from reasonrec.data_gen.tasks.rl_prompts import RlPrompts
        from reasonrec.recipes.trainers.algorithms import build_algorithm
        from reasonrec.recipes.trainers.grpo_arguments import GrpoArguments
        from reasonrec.recipes.trainers.item_grpo import ItemGRPOTrainer, RolloutSettings
        from reasonrec.recipes.trainers.scoring import Scorer
        from reasonrec.rewards.registry import load_rewards

        problem = problem or Problem()
        own = {name: options.pop(name) for name in ("settings", "probe", "out", "kit") if name in options}
        algorithm, algorithm_options = options.pop("algorithm", ("srpo", {}))
        settings = own.get("settings") or RolloutSettings(rounds=2)
        kit = own.get("kit") or make_kit(base, method, scale)
        reasoning = settings.max_chain > 0
        if reasoning:
            settings = replace(settings, close_ids=kit.close_ids)
        rng = np.random.default_rng(problem.seed)
        sequences = [rng.integers(0, 7, size=3) for _ in range(problem.prompts)]
        target = np.array([(3 * items[1] + 2) % 7 for items in sequences])
        if problem.permuted:
            target = rng.permutation(target)
        prompts = RlPrompts(
            sequences,
            np.arange(problem.prompts),
            np.full(problem.prompts, 2),
            target,
            5,
            lambda history: kit.prompt(history, reasoning=reasoning),
        )
        scorer = Scorer(load_rewards(problem.rewards), kit.policy, reasoning)
        arguments = {
            "per_device_train_batch_size": 16,
            "num_generations": 4,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "beta": 0.0,
            "max_steps": 2,
            "bf16": False,
            "gradient_checkpointing": False,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
        } | options
        return ItemGRPOTrainer(
            prompts=prompts,
            scorer=scorer,
            algorithm=build_algorithm(algorithm, algorithm_options, arguments["num_generations"]),
            settings=settings,
            probe=own.get("probe"),
            model=kit.model,
            args=GrpoArguments(output_dir=str(own.get("out", tmp_path / "out")), **arguments),
            processing_class=kit.tokenizer,
        )

    return make


@pytest.fixture
def problem() -> type[Problem]:
    """The class, for tests that want another problem."""
    return Problem
