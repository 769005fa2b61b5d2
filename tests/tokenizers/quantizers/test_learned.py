"""What all quantizers that are trained by gradient promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.health import unexplained
from reasonrec.tokenizers.quantizers.learned import Codebook
from reasonrec.tokenizers.quantizers.mixture import MixtureQuantizer
from reasonrec.tokenizers.quantizers.rq_vae import RQVAE

each = pytest.mark.parametrize("cls", [RQVAE, MixtureQuantizer])


def crossed(n: int = 320, seed: int = 0) -> np.ndarray:
    """Points whose first half says one of four things and whose second half another of four."""
    random = np.random.default_rng(seed)
    one, other = random.integers(0, 4, (2, n))
    points = np.concatenate([3 * np.eye(4)[one], 2 * np.eye(4)[other]], axis=1)
    return (points + 0.05 * random.normal(size=points.shape)).astype(np.float32)


@pytest.mark.parametrize(("cls", "options"), [(RQVAE, {}), (MixtureQuantizer, {"gate": "mean"})])
def test_it_learns_what_two_codes_can_tell(cls, options):
    points = crossed()
    quantizer = cls([8, 8], steps=300, batch_size=64, latent=8, hidden=[32], learning_rate=0.01, **options)
    codes = quantizer.fit_encode(points)
    assert codes.dtype == np.int32
    assert unexplained(points, quantizer.reconstruct(codes)) < 0.15
    assert unexplained(points, quantizer.reconstruct(codes)) < unexplained(points, quantizer.reconstruct(codes[:, :1]))
    reconstruction = quantizer.curves["reconstruction"]
    assert len(reconstruction) == len(quantizer.curves["step"]) == 100
    assert quantizer.curves["step"][-1] == 300
    assert reconstruction[-1] < reconstruction[0] / 2


@each
def test_the_seed_alone_decides(cls):
    points = crossed()
    given = {"steps": 30, "batch_size": 64, "latent": 4}
    threads = torch.get_num_threads()
    first = cls([4, 4], seed=1, **given)
    codes = first.fit_encode(points)
    try:
        torch.set_num_threads(3)
        torch.manual_seed(9)
        drawn = torch.get_rng_state()
        second = cls([4, 4], seed=1, **given)
        again = second.fit_encode(points)
        assert torch.get_num_threads() == 3
        assert torch.equal(torch.get_rng_state(), drawn)
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_array_equal(codes, again)
    assert first.curves == second.curves
    assert all(np.array_equal(array, second.state()[name]) for name, array in first.state().items())
    np.testing.assert_array_equal(first.encode(points), codes)
    other = cls([4, 4], seed=2, **given)
    other.fit_encode(points)
    assert other.curves != first.curves
    np.testing.assert_array_equal(first.fit_encode(points), codes)  # nothing is left of the first time


@each
def test_a_last_batch_that_is_too_small_is_left_out_and_few_rows_will_do(cls):
    assert cls([3, 2], steps=4, batch_size=7).fit_encode(crossed(20)).shape == (20, 2)
    assert cls([3, 2], steps=4, batch_size=7).fit_encode(crossed(3)).shape == (3, 2)


@each
def test_equal_rows_get_equal_codes_and_nothing_breaks(cls):
    quantizer = cls([3, 2], steps=4)
    codes = quantizer.fit_encode(np.ones((10, 4), dtype=np.float32))
    assert len(np.unique(codes, axis=0)) == 1
    assert np.isfinite(quantizer.reconstruct(codes)).all()


@each
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0 has to be a whole number, at least 1"),
        ({"hidden": 64}, r"hidden=64 has to be a list of whole numbers, such as \[256, 128\]"),
        ({"hidden": [64, 0]}, r"hidden\[1\]=0 has to be a whole number"),
        ({"learning_rate": 0}, "learning_rate=0 has to be a number above 0 and below 1"),
        ({"commitment": -1}, "commitment=-1 has to be a number from 0 on"),
        ({"commitment": float("nan")}, "commitment=nan has to be a number from 0 on"),
        ({"decay": 1}, "decay=1 has to be a number from 0 on and below 1"),
        ({"dead": "x"}, "dead='x' has to be a number"),
    ],
)
def test_options_out_of_range_are_refused(cls, options, message):
    with pytest.raises(UserError, match=message):
        cls([4, 4], **options)


@each
def test_what_cannot_be_coded_is_refused(cls):
    with pytest.raises(UserError, match=r"codebook_sizes\[1\]=30 is larger than the catalogue of 20 items"):
        cls([4, 30]).fit_encode(crossed(20))
    points = crossed(20)
    points[3] = np.nan
    with pytest.raises(UserError, match=r"1 embeddings are not finite \(items 3\)"):
        cls([4, 4]).fit_encode(points)
    with pytest.raises(ValueError, match="has to be fitted"):
        cls([4, 4]).encode(crossed(20))


def test_a_codebook_follows_the_averages_of_what_it_is_given():
    book = Codebook(2, 1)
    book.start(torch.tensor([[0.0], [0.0], [10.0], [10.0]]), seed=0)
    low, high = book.nearest(torch.tensor([[1.0], [9.0]])).tolist()
    assert book.vectors[[low, high]].flatten().tolist() == [0.0, 10.0]
    assert book.average().item() == pytest.approx(5.0)
    for _ in range(200):
        points = torch.tensor([[1.0], [1.0], [1.0], [8.0]])
        book.update(points, book.nearest(points), decay=0.9, dead=0.1)
    assert book.vectors[[low, high]].flatten().tolist() == pytest.approx([1.0, 8.0], abs=1e-3)
    assert book.average().item() == pytest.approx(11 / 4, abs=1e-3)


def test_a_code_that_nothing_is_given_starts_again_at_a_point():
    book = Codebook(2, 1)
    book.start(torch.tensor([[0.0], [100.0]]), seed=0)
    points = torch.tensor([[1.0], [3.0]])
    for _ in range(60):
        book.update(points, book.nearest(points), decay=0.9, dead=0.1)
    assert sorted(book.vectors.flatten().tolist()) == pytest.approx([1.0, 3.0], abs=0.1)
