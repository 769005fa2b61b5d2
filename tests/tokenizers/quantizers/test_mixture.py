from __future__ import annotations

import numpy as np
import pytest

from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.quantizers.mixture import MixtureQuantizer

POINTS = np.random.default_rng(0).normal(size=(80, 6)).astype(np.float32)


def overlap(quantizer: MixtureQuantizer) -> float:
    state = quantizer.state()
    columns = np.concatenate([state[f"experts.{level}.weight"] for level in range(2)])
    columns /= np.linalg.norm(columns, axis=1, keepdims=True)
    return float(np.square(columns @ columns.T - np.eye(len(columns))).sum())


def test_a_level_looks_at_its_own_expert_alone():
    quantizer = MixtureQuantizer([4, 3], steps=10, latent=2)
    codes = quantizer.fit_encode(POINTS)
    state = quantizer.state()
    points = (POINTS - state["mean"]) / np.float32(state["scale"][0])
    for level in range(2):
        latent = points @ state[f"experts.{level}.weight"].T + state[f"experts.{level}.bias"]
        distances = np.square(latent[:, None] - state[f"books.{level}.vectors"]).sum(2)
        np.testing.assert_array_equal(distances.argmin(1), codes[:, level])


def test_orthogonality_keeps_the_experts_apart():
    alike, apart = (
        MixtureQuantizer([4, 4], steps=100, latent=2, hidden=[16], learning_rate=0.01, orthogonality=weight)
        for weight in (0.0, 0.1)
    )
    alike.fit_encode(POINTS)
    apart.fit_encode(POINTS)
    assert overlap(apart) < overlap(alike) / 5


def test_balance_keeps_every_codebook_in_use():
    shares = []
    for weight in (0.0, 10.0):
        quantizer = MixtureQuantizer([4, 4], steps=100, latent=2, hidden=[16], learning_rate=0.01, balance=weight)
        quantizer.fit_encode(POINTS)
        shares.append(quantizer.state()["shares"])
    np.testing.assert_allclose([s.sum() for s in shares], 1, atol=1e-5)
    assert np.abs(shares[1] - 0.5).max() < np.abs(shares[0] - 0.5).max() / 2


def test_equal_shares_have_no_gate():
    quantizer = MixtureQuantizer([4, 3, 2], steps=10, gate="mean")
    quantizer.fit_encode(POINTS)
    state = quantizer.state()
    assert not [name for name in state if name.startswith("gate")]
    np.testing.assert_allclose(state["shares"], 1 / 3)
    assert "balance" not in quantizer.curves


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate": "hard"}, "gate='hard' has to be one of softmax, mean"),
        ({"orthogonality": -0.1}, "orthogonality=-0.1 has to be a number from 0 on"),
        ({"balance": None}, "balance=None has to be a number from 0 on"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        MixtureQuantizer([4, 4], **options)
