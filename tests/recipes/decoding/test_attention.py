"""The search's attention against PyTorch's."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from reasonrec.recipes.decoding import attention
from reasonrec.recipes.decoding.attention import BRANCHES, additive, branch_attention, branches


class Layer(torch.nn.Module):
    """What transformers' kernels ask an attention layer."""

    is_causal = True

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups


@pytest.mark.parametrize(("heads", "key_heads"), [(9, 3), (4, 4), (6, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_fused_kernels_result(heads, key_heads, dtype, monkeypatch):
    torch.manual_seed(0)
    rows, new, slots, width = 3, 5, 11, 16
    layer = Layer(heads // key_heads)
    query = torch.randn(rows, new, heads, width, dtype=dtype).transpose(1, 2)
    buffer = torch.randn(2, rows, key_heads, slots + 4, width, dtype=dtype)
    key, value = buffer[0, :, :, :slots], buffer[1, :, :, :slots]  # a view of a longer cache
    seen = torch.rand(rows, 1, new, slots) < 0.5
    seen[..., 2] = True
    mask = additive(seen, dtype)
    expected, _ = sdpa_attention_forward(layer, query, key, value, seen, scaling=0.3)
    monkeypatch.setattr(attention, "sdpa_attention_forward", None)
    monkeypatch.setattr(attention, "_FEWEST", 1)
    got, weights = branch_attention(layer, query, key, value, mask, scaling=0.3)
    assert weights is None
    assert got.shape == (rows, new, heads, width)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("extra", [{}, {"position_bias": torch.zeros(1, 4, 2, 3)}, {"dropout": 0.1}])
def test_the_fused_kernel_does_what_it_is_no_good_at(extra, monkeypatch):
    calls = []
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *_, **options: calls.append(options))
    monkeypatch.setattr(attention, "_FEWEST", 25 if not extra else 1)  # 1 * 4 * 2 * 3 weights
    states = torch.randn(1, 4, 3, 8)
    branch_attention(Layer(1), states[:, :, :2], states, states, torch.zeros(1, 1, 2, 3), **extra)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qwen3", {"head_dim": 16, "num_key_value_heads": 2}),
        ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}),
        ("phi", {}),
        ("gemma3_text", {"head_dim": 16, "sliding_window": 64}),
    ],
)
def test_whole_models_attend_the_same(name, options, make_world, make_architecture, monkeypatch):
    model = make_architecture(name, **options)
    model.set_attn_implementation("sdpa")
    world = make_world(model, np.random.default_rng(0), n_items=25)
    fused = world.beam()
    used = []
    plain = attention.torch.bmm
    monkeypatch.setattr(attention, "_FEWEST", 1)
    monkeypatch.setattr(attention.torch, "bmm", lambda *a: (used.append(1), plain(*a))[1])
    ours = world.beam()
    assert used
    assert torch.equal(ours.items, fused.items)
    torch.testing.assert_close(ours.scores, fused.scores, atol=1e-5, rtol=1e-5)


def test_a_model_gets_its_attention_back(make_model):
    model = make_model()
    with branches(model) as takes_booleans:
        assert model.config._attn_implementation == BRANCHES
        assert not takes_booleans
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(RuntimeError), branches(model):
        raise RuntimeError
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    with branches(model) as takes_booleans:
        assert model.config._attn_implementation == "eager"
        assert not takes_booleans


def test_threads_may_search_with_one_model(world):
    expected = world.beam()
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: world.beam(), range(24)):
            assert torch.equal(found.items, expected.items)
            torch.testing.assert_close(found.scores, expected.scores, atol=1e-5, rtol=1e-5)
    assert world.model.config._attn_implementation == "sdpa"
