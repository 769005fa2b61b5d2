from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.health import unexplained
from reasonrec.tokenizers.quantizers.product import ProductQuantizer


def turned(n: int = 600, seed: int = 0) -> np.ndarray:
    """Two independent choices of one in eight, each in a space of its own, seen after a rotation that mixes both."""
    random = np.random.default_rng(seed)
    points = np.concatenate([random.normal(size=(8, 4))[random.integers(0, 8, n)] for _ in range(2)], axis=1)
    rotation, _ = np.linalg.qr(random.normal(size=(8, 8)))
    return (points @ rotation + 0.05 * random.normal(size=points.shape) + 7).astype(np.float32)


def test_the_rotation_is_found():
    """Not always, for the search is a local one; but never is it worse than the principal axes."""
    left = []
    for seed in range(4):
        points = turned(seed=seed)
        quantizers = [ProductQuantizer([8, 8], rotations=rotations) for rotations in (0, 20)]
        left.append([unexplained(points, q.reconstruct(q.fit_encode(points))) for q in quantizers])
    assert all(fitted < principal for principal, fitted in left)
    assert min(fitted for _, fitted in left) < 0.05 < min(principal for principal, _ in left)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 7), st.integers(1, 3))
def test_levels_stand_at_right_angles_and_more_of_them_explain_more(seed, dim, depth):
    depth = min(depth, dim)
    points = np.random.default_rng(seed).normal(size=(30, dim)).astype(np.float32)
    quantizer = ProductQuantizer([4] * depth, seed=seed, rotations=3, n_init=1)
    codes = quantizer.fit_encode(points)
    books = quantizer.codebooks
    for number, one in enumerate(books):
        assert one.shape == (4, dim)
        for other in books[number + 1 :]:
            np.testing.assert_allclose(one @ other.T, 0, atol=1e-4)
    left = [unexplained(points, quantizer.reconstruct(codes[:, :length])) for length in range(1, depth + 1)]
    assert all(after <= before + 1e-5 for before, after in zip([1.0, *left], left, strict=False))
    # Of all combinations the codes are the best: the levels do not depend on each other.
    grid = np.stack(np.meshgrid(*[range(4)] * depth, indexing="ij"), axis=-1).reshape(-1, depth)
    errors = np.square(points[:, None] - quantizer.reconstruct(grid)).sum(2)
    mine = np.square(points - quantizer.reconstruct(codes)).sum(1)
    np.testing.assert_allclose(mine, errors.min(1), rtol=1e-3, atol=1e-4)


def test_the_seed_alone_decides():
    points = turned(200)
    codes = ProductQuantizer([8, 4], seed=1).fit_encode(points)
    with threadpool_limits(limits=2):
        np.testing.assert_array_equal(ProductQuantizer([8, 4], seed=1).fit_encode(points), codes)


def test_equal_rows_get_equal_codes_and_nothing_breaks():
    quantizer = ProductQuantizer([3, 2])
    codes = quantizer.fit_encode(np.ones((10, 4), dtype=np.float32))
    assert len(np.unique(codes, axis=0)) == 1
    np.testing.assert_allclose(quantizer.reconstruct(codes), 1)


def test_what_cannot_be_coded_is_refused():
    with pytest.raises(UserError, match="rotations=-1 has to be a whole number, at least 0"):
        ProductQuantizer([4, 4], rotations=-1)
    with pytest.raises(UserError, match="codebook_sizes has 9 levels, but embeddings of 8 dimensions"):
        ProductQuantizer([2] * 9).fit_encode(turned(20))
    with pytest.raises(UserError, match=r"codebook_sizes\[0\]=30 is larger than the catalogue of 20"):
        ProductQuantizer([30]).fit_encode(turned(20))
    with pytest.raises(ValueError, match="needs the codebooks"):
        ProductQuantizer([4, 4]).encode(turned(20))
