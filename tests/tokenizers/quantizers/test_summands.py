"""The space in which every quantizer's codes add up, in which new items find theirs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from reasonrec.tokenizers.grow import nearest_tuples
from reasonrec.tokenizers.quantizers.base import build_quantizer

OPTIONS: dict[str, dict[str, Any]] = {
    "balanced": {},
    "plain": {},
    "product": {"rotations": 2},
    "rq_vae": {"steps": 30, "latent": 4, "hidden": [8]},
    "mixture": {"steps": 30, "latent": 4, "hidden": [8]},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_nearest_on_one_level_after_the_other_is_the_code(name: str) -> None:
    random = np.random.default_rng(0)
    rows, new = (random.normal(size=(n, 12)).astype(np.float32) for n in (200, 40))
    quantizer = build_quantizer(name, [6, 5, 4], 0, OPTIONS[name])
    quantizer.fit_encode(rows)
    points, books = quantizer.summands(new)
    assert [len(book) for book in books] == [6, 5, 4]
    assert {book.shape[1] for book in books} == {points.shape[1]}
    one_by_one, greedy = nearest_tuples(points, books, 1)
    assert np.array_equal(one_by_one[:, 0], quantizer.encode(new))
    best, distances = nearest_tuples(points, books, 64)
    assert (distances[:, 0] <= greedy[:, 0] + 1e-4).all()
    if name in ("product", "mixture"):  # levels do not depend on each other
        assert np.array_equal(best[:, 0], one_by_one[:, 0])
    again = build_quantizer(name, [6, 5, 4], 0, OPTIONS[name])
    again.restore(quantizer.state())
    assert np.array_equal(again.summands(new)[0], points)
