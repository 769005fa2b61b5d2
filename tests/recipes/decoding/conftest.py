"""A model small enough to search by brute force, a trie, prompts: what the tests of the item search share."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from reasonrec.recipes.decoding.search import beam_search
from reasonrec.tokenizers.trie import Trie
from reasonrec.tokenizers.vocabulary import Vocabulary

TEXT = 20  # ordinary tokens in front of the begin marker
EOS = 3
COLUMNS = 40
SIZES = (5, 6, 3)


def small_model(*, tied: bool = True, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=TEXT + 1 + COLUMNS,
        eos_token_id=EOS,
        pad_token_id=EOS,
        bos_token_id=None,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,  # far from uniform, so that an order means something
        tie_word_embeddings=tied,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config).eval()


def random_codes(rng: np.random.Generator, n_items: int, sizes: tuple[int, ...]) -> np.ndarray:
    """Unique codes on all levels but the last, where about half of the groups are told apart by the last level."""
    every = np.stack(np.meshgrid(*map(np.arange, sizes[:-1]), indexing="ij"), -1).reshape(-1, len(sizes) - 1)
    rows = []
    for row in every[rng.permutation(len(every))]:
        size = sizes[-1] if len(sizes) > 1 and rng.random() < 0.5 else 0
        rows += [[*row, last] for last in range(size)] if size else [[*row, -1]]
    codes = np.array(rows[:n_items])
    return codes[rng.permutation(len(codes))]


class World:
    """A model, a trie and prompts."""

    def __init__(self, model, rng: np.random.Generator, *, n_items: int = 40, sizes: tuple[int, ...] = SIZES) -> None:
        self.model = model
        self.codes = random_codes(rng, n_items, sizes)
        self.n_items = len(self.codes)
        self.trie = Trie.from_codes(self.codes, sizes)
        self.vocabulary = Vocabulary(sizes, TEXT)
        self.ids = self.vocabulary.item_token_ids(self.codes)
        self.prompts = [[*rng.integers(0, TEXT, size=n).tolist(), TEXT] for n in (3, 9, 1, 6)]

    def batch(self, prompts: list[list[int]], pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(map(len, prompts)) + pad
        ids = torch.tensor([[7] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        return ids, mask

    def beam(self, prompts=None, pad: int = 0, **options):
        options = {"k": self.n_items, "num_beams": self.n_items} | options
        return beam_search(
            self.model, self.trie, self.vocabulary, *self.batch(prompts or self.prompts, pad), **options
        )

    @torch.no_grad()
    def brute_force(self, prompt: list[int], forward=None) -> np.ndarray:
        """Log-probability of each item from full logits, with a dictionary instead of a trie."""
        legal: dict[tuple[int, ...], set[int]] = {}
        for ids in self.ids:
            for n in range(len(ids)):
                legal.setdefault(tuple(ids[:n]), set()).add(ids[n])
        scores = []
        for ids in self.ids:
            logits = (forward or self.model)(torch.tensor([prompt + ids])).logits[0].double()
            score = 0.0
            for n, token in enumerate(ids):
                children = sorted(legal[tuple(ids[:n])])
                row = logits[len(prompt) - 1 + n, children].log_softmax(0)
                score += float(row[children.index(token)])
            scores.append(score)
        return np.array(scores)


def architecture(name: str, **options):
    """A two-layer model of another family."""
    common = {
        "vocab_size": TEXT + 1 + COLUMNS,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **(common | options))).eval()
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:
        torch.nn.init.normal_(bias)
    return model


@pytest.fixture(scope="session")
def make_world() -> type[World]:
    return World


@pytest.fixture(scope="session")
def make_model():
    return small_model


@pytest.fixture(scope="session")
def make_architecture():
    return architecture


@pytest.fixture(scope="module")
def world() -> World:
    return World(small_model(), np.random.default_rng(0))
