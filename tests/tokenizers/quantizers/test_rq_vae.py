from __future__ import annotations

import numpy as np
import pytest
import torch

from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.quantizers.learned import straight_through
from reasonrec.tokenizers.quantizers.rq_vae import RQVAE, rotate


def test_the_rotation_gives_the_vectors_and_turns_the_gradient_with_them():
    torch.manual_seed(0)
    points = torch.randn(50, 6, dtype=torch.float64, requires_grad=True)
    vectors = torch.randn(50, 6, dtype=torch.float64)
    out = rotate(points, vectors)
    torch.testing.assert_close(out, vectors)
    # A gradient along the vector comes back along the point, as long as the ratio of their lengths says.
    (gradient,) = torch.autograd.grad((out * vectors).sum(), points)
    ratio = vectors.norm(dim=1, keepdim=True) / points.norm(dim=1, keepdim=True)
    expected = ratio**2 * points
    torch.testing.assert_close(gradient, expected.detach())
    (through,) = torch.autograd.grad((straight_through(points, vectors) * vectors).sum(), points)
    torch.testing.assert_close(through, vectors)


def test_the_second_level_codes_what_the_first_left_over():
    points = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    quantizer = RQVAE([4, 3], steps=10, latent=3)
    codes = quantizer.fit_encode(points)
    state = {name: torch.from_numpy(array) for name, array in quantizer.state().items()}
    latent = (torch.from_numpy(points) - state["mean"]) / state["scale"].float()
    for layer in (0, 2, 4):
        latent = latent @ state[f"encoder.{layer}.weight"].T + state[f"encoder.{layer}.bias"]
        latent = latent.relu() if layer < 4 else latent
    for level in range(2):
        book = state[f"books.{level}.vectors"]
        nearest = torch.cdist(latent, book).argmin(1)
        np.testing.assert_array_equal(nearest.numpy(), codes[:, level])
        latent = latent - book[nearest]


def test_gradients():
    points = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    one, other = (RQVAE([4, 3], steps=10, gradient=gradient) for gradient in ("straight_through", "rotation"))
    one.fit_encode(points)
    other.fit_encode(points)
    assert one.curves["reconstruction"][0] == pytest.approx(other.curves["reconstruction"][0], rel=1e-4)
    assert one.curves["reconstruction"][-1] != other.curves["reconstruction"][-1]
    with pytest.raises(UserError, match="gradient='turn' has to be one of straight_through, rotation"):
        RQVAE([4, 3], gradient="turn")
