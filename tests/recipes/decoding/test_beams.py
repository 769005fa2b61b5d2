"""One step of the search against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from reasonrec.recipes.decoding.beams import Beams, choose, promised
from reasonrec.tokenizers.trie import Trie

# Behind code 0 there are four items, behind 1 one, behind 2 two.
TRIE = Trie.from_codes(np.array([[0, 0], [0, 1], [0, 2], [0, 3], [1, 0], [2, 0], [2, 1]]), (3, 4))


def step(logits: list[float], *, k: int, keep: int, excluded=None, normaliser=None):
    cpu = torch.device("cpu")
    return choose(
        TRIE,
        torch.tensor([[[*logits, 0.0, 0.0, 0.0, 0.0]]]),
        Beams.root(1, cpu),
        Beams.none(1, cpu),
        first=0,
        width=3,
        k=k,
        keep=keep,
        normaliser=normaliser,
        excluded=excluded,
    )


def logs(*probabilities: float) -> list[float]:
    return [math.log(p) for p in probabilities]


def test_a_prefix_promises_its_even_share():
    """p = .6 over four items promises .15; the item of code 1 has .3 for certain; .1 over two promises .05."""
    best = step(logs(0.6, 0.3, 0.1), k=1, keep=3)
    np.testing.assert_allclose(best.beams.score.exp(), [[0.6, 0.3, 0.1]], atol=1e-6)
    unfinished = best.beams.item < 0
    assert unfinished.tolist() == [[True, False, True]]
    for k, promise in ((1, 0.3), (2, 0.15), (3, 0.05)):
        enough = promised(TRIE, best.beams, unfinished, None, sums_up=True, k=k)
        assert enough.exp().item() == pytest.approx(promise, abs=1e-6)
    assert promised(TRIE, best.beams, unfinished, None, sums_up=True, k=4).item() == -math.inf


def test_what_cannot_reach_the_list_is_not_read():
    assert step(logs(0.6, 0.3, 0.1), k=1, keep=3).is_open.tolist() == [[True, False, False]], ".1 < .3"
    assert step(logs(0.6, 0.3, 0.1), k=2, keep=3).is_open.tolist() == [[True, False, False]], ".1 < .15"
    assert step(logs(0.6, 0.3, 0.1), k=3, keep=3).is_open.tolist() == [[True, False, True]]
    assert step(logs(0.5, 0.3, 0.2), k=2, keep=3).is_open.tolist() == [[True, False, True]], ".2 > .125"


def test_a_prefix_with_excluded_items_promises_nothing():
    excluded = TRIE.excluded_ranks([[1]])
    best = step(logs(0.6, 0.3, 0.1), k=2, keep=3, excluded=excluded)
    assert best.is_open.tolist() == [[True, False, True]], "only .05 is promised by the third, nothing by the first"


def test_under_the_full_vocabulary_only_items_promise():
    """Codes of a prefix then sum to less than the prefix."""
    best = step(logs(0.6, 0.3, 0.1), k=2, keep=3, normaliser=torch.zeros(1, 1))
    assert best.is_open.tolist() == [[True, True, True]], "not even one item below a prefix is certain"


def test_the_best_that_was_not_kept_is_reported():
    best = step(logs(0.6, 0.3, 0.1), k=1, keep=2)
    assert best.lost.exp().item() == pytest.approx(0.1, abs=1e-6)
    assert step(logs(0.6, 0.3, 0.1), k=1, keep=3).lost.item() == -math.inf
