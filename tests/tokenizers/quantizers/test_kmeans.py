import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from threadpoolctl import threadpool_limits

from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.quantizers.kmeans import (
    BalancedResidualKMeans,
    ResidualKMeans,
    SampledResidualKMeans,
    balanced_assignment,
    encode_residual,
)

QUANTIZERS = [BalancedResidualKMeans, ResidualKMeans]
both = pytest.mark.parametrize("cls", QUANTIZERS, ids=["balanced", "plain"])


def clusters(n_clusters: int, members: int, dim: int = 16, noise: float = 0.02, seed: int = 0) -> np.ndarray:
    """Well separated clusters; row i belongs to cluster i % n_clusters."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(n_clusters, dim))
    points = np.tile(centres, (members, 1)) + noise * random.normal(size=(n_clusters * members, dim))
    return points.astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(1, 6))
def test_the_auction_is_nearly_optimal_and_fills_every_column(seed, n_rows, n_columns):
    random = np.random.default_rng(seed)
    costs = random.normal(size=(n_rows, n_columns))
    capacities = np.bincount(random.integers(0, n_columns, n_rows), minlength=n_columns)
    capacities = np.sort(capacities)[::-1]
    if (capacities == 0).any():
        costs, capacities = costs[:, capacities > 0], capacities[capacities > 0]
    labels = balanced_assignment(costs, capacities, [0.1, 1e-4])
    np.testing.assert_array_equal(np.bincount(labels, minlength=len(capacities)), capacities)
    slots = np.repeat(costs, capacities, axis=1)
    best = slots[linear_sum_assignment(slots)].sum()
    assert costs[np.arange(n_rows), labels].sum() <= best + n_rows * 1e-4 + 1e-9


def test_the_auction_by_hand():
    # Both rows prefer column 0, which holds one: row 1 loses less by moving.
    costs = np.array([[0.0, 10.0], [0.0, 1.0]])
    np.testing.assert_array_equal(balanced_assignment(costs, np.array([1, 1]), [0.1]), [0, 1])
    with pytest.raises(ValueError, match="add up to 3, not to the 2 rows"):
        balanced_assignment(costs, np.array([2, 1]), [0.1])


def test_a_sample_says_where_the_centroids_begin():
    points = clusters(8, 50)
    found = SampledResidualKMeans([8, 2], rows_per_code=20)
    codes = found.fit_encode(points)
    assert len({(i % 8, int(code)) for i, code in enumerate(codes[:, 0])}) == 8
    for code in range(8):  # of all rows, not of those drawn
        np.testing.assert_allclose(found.codebooks[0][code], points[codes[:, 0] == code].mean(0), atol=1e-5)
    np.testing.assert_array_equal(SampledResidualKMeans([8, 2], rows_per_code=20).fit_encode(points), codes)
    whole = SampledResidualKMeans([8, 2], rows_per_code=200).fit_encode(points)
    np.testing.assert_array_equal(whole, ResidualKMeans([8, 2]).fit_encode(points))
    with pytest.raises(UserError, match="rows_per_code=-1 has to be a whole number"):
        SampledResidualKMeans([8], rows_per_code=-1)


@both
def test_planted_clusters_are_found(cls):
    points = clusters(8, 20)
    codes = cls([8], seed=3).fit_encode(points)
    assert codes.dtype == np.int32
    pairs = {(i % 8, int(code)) for i, code in enumerate(codes[:, 0])}
    assert len(pairs) == 8


@pytest.mark.parametrize("n", [40, 47, 64])
def test_balanced_clusters_have_the_floor_or_the_ceiling(n):
    points = np.random.default_rng(0).normal(size=(n, 5)).astype(np.float32)
    codes = BalancedResidualKMeans([8, 5], n_init=1).fit_encode(points)
    for level, size in enumerate([8, 5]):
        counts = np.bincount(codes[:, level], minlength=size)
        assert counts.min() >= n // size
        assert counts.max() <= -(-n // size)


def test_balance_holds_on_skewed_data_where_plain_k_means_has_none():
    points = np.concatenate([clusters(1, 300, noise=0.3), 5 + clusters(3, 4, noise=0.3)])
    plain = np.bincount(ResidualKMeans([4]).fit_encode(points)[:, 0])
    balanced = np.bincount(BalancedResidualKMeans([4]).fit_encode(points)[:, 0])
    assert plain.max() > 120
    assert plain.min() < 10
    assert balanced.max() == balanced.min() == len(points) // 4


@both
def test_the_second_level_codes_the_residual(cls):
    random = np.random.default_rng(1)
    coarse, fine = random.integers(0, 4, 320), random.integers(0, 4, 320)
    points = (10 * np.eye(8)[coarse] + np.eye(8)[4 + fine]).astype(np.float32)
    quantizer = cls([4, 4])
    codes = quantizer.fit_encode(points)
    if cls is ResidualKMeans:  # equal cluster sizes cannot hold these unequal groups
        assert len(set(zip(coarse, fine, codes[:, 0], codes[:, 1], strict=True))) == 16
    rebuilt = sum(book[codes[:, level]] for level, book in enumerate(quantizer.codebooks))
    first = quantizer.codebooks[0][codes[:, 0]]
    assert np.square(points - rebuilt).sum() < np.square(points - first).sum() < np.square(points).sum()


@both
def test_codebooks_are_the_means_of_what_they_code(cls):
    points = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    quantizer = cls([6, 3])
    codes = quantizer.fit_encode(points)
    assert [book.shape for book in quantizer.codebooks] == [(6, 4), (3, 4)]
    assert all(book.dtype == np.float32 for book in quantizer.codebooks)
    for code in range(6):
        np.testing.assert_allclose(quantizer.codebooks[0][code], points[codes[:, 0] == code].mean(0), atol=1e-5)


@both
def test_new_rows_get_the_nearest_centroids(cls):
    points = np.random.default_rng(0).normal(size=(80, 6)).astype(np.float32)
    quantizer = cls([8, 4])
    quantizer.fit_encode(points)
    new = np.random.default_rng(1).normal(size=(30, 6)).astype(np.float32)
    codes = quantizer.encode(new)
    residual = new.copy()
    for level, book in enumerate(quantizer.codebooks):
        nearest = np.square(residual[:, None] - book).sum(2).argmin(1)
        np.testing.assert_array_equal(codes[:, level], nearest)
        residual -= book[nearest]
    np.testing.assert_array_equal(codes, encode_residual(new, quantizer.codebooks))


@both
def test_encode_agrees_with_fit_encode_on_separated_clusters(cls):
    points = clusters(8, 10)
    quantizer = cls([8])
    codes = quantizer.fit_encode(points)
    np.testing.assert_array_equal(quantizer.encode(points), codes)


@both
def test_equal_seeds_give_equal_codes_on_any_number_of_threads(cls):
    points = np.random.default_rng(0).normal(size=(500, 12)).astype(np.float32)
    codes = []
    for threads in (1, 2):
        with threadpool_limits(limits=threads):
            codes.append(cls([16, 16], seed=5).fit_encode(points))
    np.testing.assert_array_equal(*codes)
    assert (cls([16, 16], seed=6).fit_encode(points) != codes[0]).any()


@both
def test_input_is_left_alone(cls):
    points = clusters(4, 5)
    before = points.copy()
    quantizer = cls([4, 4])
    quantizer.fit_encode(points)
    quantizer.encode(points)
    np.testing.assert_array_equal(points, before)


@both
def test_identical_rows_are_coded(cls):
    points = np.ones((50, 4), dtype=np.float32)
    quantizer = cls([8, 8])
    codes = quantizer.fit_encode(points)
    assert codes.shape == (50, 2)
    assert all(np.isfinite(book).all() for book in quantizer.codebooks)


@both
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([4, 21], r"codebook_sizes\[1\]=21 is larger than the catalogue of 20 items.*at most 20"),
        ([1], r"codebook_sizes\[0\]=1 has to be at least 2"),
        ([], "codebook_sizes is empty"),
    ],
)
def test_sizes_that_cannot_work_are_refused(cls, sizes, message):
    with pytest.raises(UserError, match=message):
        cls(sizes).fit_encode(clusters(4, 5))


@both
def test_embeddings_that_are_not_finite_name_the_items(cls):
    points = clusters(4, 5)
    points[[3, 7], 0] = np.nan
    with pytest.raises(UserError, match=r"2 embeddings are not finite \(items 3, 7\)"):
        cls([4]).fit_encode(points)


@both
@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (1e38, "too long for float32"),
        (2e8, "fine"),
        (1e9, "too long for float32"),
        (1e300, "not finite"),
        (-np.inf, "not fin"),
    ],
)
def test_embeddings_whose_squares_overflow_name_the_items(cls, value, problem):
    """1e38 is finite, but distances to it are not; the largest that are let through make finite codebooks."""
    points = clusters(4, 5).astype(np.float64)
    points[[3, 7], 0] = value
    quantizer = cls([4, 4], n_init=1)
    if problem == "fine":
        quantizer.fit_encode(points)
        assert all(np.isfinite(book).all() for book in quantizer.codebooks)
        quantizer.encode(points)
        return
    with pytest.raises(UserError, match=rf"2 embeddings are {problem}.*\(items 3, 7\): that of item 3 has length"):
        quantizer.fit_encode(points)
    quantizer.codebooks = [np.zeros((4, 16), np.float32)]
    with pytest.raises(UserError, match="that of item 3 has length"):
        quantizer.encode(points)


@both
def test_a_codebook_as_large_as_the_catalogue_works(cls):
    points = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
    assert len(np.unique(cls([12]).fit_encode(points))) == 12


def test_encode_needs_codebooks():
    with pytest.raises(ValueError, match="fit_encode"):
        ResidualKMeans([4]).encode(clusters(4, 5))
