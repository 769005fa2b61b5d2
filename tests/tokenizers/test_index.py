import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import save_file

from reasonrec.tokenizers.artefact import staged
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.index import (
    INDEX_FILE,
    ItemIndex,
    build_index,
    external_index,
    external_sids,
    load_codewords,
    load_embeddings,
    load_quantizer,
    row_keys,
    save_quantizer,
)
from reasonrec.tokenizers.manifest import Manifest
from reasonrec.tokenizers.quantizers.base import QUANTIZERS, Quantizer, build_quantizer

DATA = Path(os.environ.get("REASONREC_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
INDUSTRIAL = DATA / "industrial"
needs_industrial = pytest.mark.skipif(not INDUSTRIAL.is_dir(), reason="the Industrial benchmark files are not here")


def item_codes() -> st.SearchStrategy[np.ndarray]:
    shape = st.tuples(st.integers(1, 40), st.integers(1, 3))
    return shape.flatmap(lambda s: arrays(np.int64, s, elements=st.integers(0, 3)))


@settings(max_examples=150, deadline=None)
@given(item_codes())
def test_every_index_is_unique_and_prefix_free(codes):
    index = build_index(codes, [4] * codes.shape[1])
    tuples = index.tuples()
    assert len(set(tuples)) == len(tuples)
    prefixes = {t[:length] for t in tuples for length in range(1, len(t))}
    assert not prefixes & set(tuples)
    assert all(t[: index.depth] == tuple(row) for t, row in zip(tuples, codes.tolist(), strict=True))
    groups: dict[tuple[int, ...], list[int]] = {}
    for item, row in enumerate(codes.tolist()):
        groups.setdefault(tuple(row), []).append(item)
    for members in groups.values():
        expected = [-1] if len(members) == 1 else list(range(len(members)))
        assert index.codes[members, -1].tolist() == expected
    assert index.level_sizes[-1] == max([len(m) for m in groups.values() if len(m) > 1], default=0)


def test_disambiguation_by_hand():
    index = build_index(np.array([[3, 1], [0, 2], [3, 1], [3, 0]]), [4, 4])
    assert index.tuples() == [(3, 1, 0), (0, 2), (3, 1, 1), (3, 0)]
    assert index.level_sizes == (4, 4, 2)
    assert index.codes.dtype == np.int32
    assert (index.depth, index.n_items) == (2, 4)


def test_no_collision_means_no_disambiguation_level():
    index = build_index(np.array([[0], [1]]), [2])
    assert index.level_sizes == (2, 0)
    assert index.tuples() == [(0,), (1,)]


@pytest.mark.parametrize(
    ("codes", "sizes", "message"),
    [
        (
            [[0, 1, -1], [0, 1, 0]],
            (2, 2, 2),
            r"items 0 and 1 have the codes \[0, 1\], but item 0 has no disamb",
        ),
        ([[0, 1, 0], [0, 1, 0]], (2, 2, 2), "item 0 shares its whole code"),
        ([[0, 2, -1]], (2, 2, 0), r"item 0 has code 2 on level 1; valid is 0\.\.1"),
        ([[0, -1, -1]], (2, 2, 0), "item 0 has code -1 on level 1"),
        ([[0, 1, -2]], (2, 2, 1), "item 0 has code -2 on level 2"),
        ([[0, 1]], (2, 2, 0), "do not fit 3 levels"),
    ],
)
def test_broken_promises_are_found(codes, sizes, message):
    with pytest.raises(UserError, match=message):
        ItemIndex(np.array(codes, dtype=np.int32), sizes).validate()


def write(folder: Path, index: ItemIndex, dataset_hash: str = "d" * 64) -> None:
    with staged(folder, kind="index", config={}, inputs={"dataset": dataset_hash}) as (partial, _):
        index.save(partial)


def test_save_and_load(tmp_path):
    index = build_index(np.array([[3, 1], [0, 2], [3, 1]]), [4, 4])
    write(tmp_path / "index", index)
    loaded = ItemIndex.load(tmp_path / "index")
    np.testing.assert_array_equal(loaded.codes, index.codes)
    assert loaded.codes.dtype == np.int32
    assert loaded.level_sizes == index.level_sizes
    assert loaded.manifest is not None
    assert loaded.manifest.kind == "index"


def test_another_dataset_is_refused_with_both_hashes_and_the_command(tmp_path):
    write(tmp_path / "index", build_index(np.array([[0], [1]]), [2]), dataset_hash="a" * 64)
    index = ItemIndex.load(tmp_path / "index")
    index.check_dataset(Manifest(kind="dataset", config={}, seed=0, hash="a" * 64))
    with pytest.raises(UserError, match=r"dataset aaaaaaaaaaaa….*bbbbbbbbbbbb….*recipes/index_items\.py"):
        index.check_dataset(Manifest(kind="dataset", config={}, seed=0, hash="b" * 64))


def test_a_changed_file_is_refused(tmp_path):
    write(tmp_path / "index", build_index(np.array([[0], [1]]), [2]))
    path = tmp_path / "index" / INDEX_FILE
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="was changed"):
        ItemIndex.load(tmp_path / "index")


# Of each quantizer what makes it quick here.
QUICK: dict[str, dict[str, Any]] = {
    "balanced": {}, "plain": {}, "product": {}, "rq_vae": {"steps": 20}, "mixture": {"steps": 20},
}  # fmt: skip


def quantized(folder: Path, name: str, config: dict[str, Any]) -> tuple[Quantizer, np.ndarray]:
    """A fitted quantizer, saved beside an index, and embeddings it has not seen."""
    seen, new = np.random.default_rng(0).normal(size=(2, 40, 6)).astype(np.float32)
    quantizer = build_quantizer(name, [5, 4], 3, QUICK[name])
    index = build_index(quantizer.fit_encode(seen), [5, 4])
    with staged(folder, kind="index", config=config) as (partial, _):
        index.save(partial)
        save_quantizer(partial, quantizer, seen)
    np.testing.assert_array_equal(load_embeddings(folder), seen)
    return quantizer, new


def test_every_quantizer_is_tried():
    assert QUICK.keys() == QUANTIZERS.entries().keys()


@pytest.mark.parametrize("name", QUICK)
def test_new_items_are_coded_from_the_artefact(tmp_path, name):
    config = {"quantizer": name, "codebook_sizes": [5, 4], "quantizer_options": QUICK[name], "seed": 3}
    quantizer, new = quantized(tmp_path / "index", name, config)
    loaded = load_quantizer(tmp_path / "index")
    codes = quantizer.encode(new)
    assert codes.shape == (40, 2)
    assert codes.dtype == np.int32
    np.testing.assert_array_equal(loaded.encode(new), codes)
    for length in (1, 2):
        rebuilt = quantizer.reconstruct(codes[:, :length])
        assert rebuilt.shape == (40, 6)
        assert rebuilt.dtype == np.float32
        np.testing.assert_array_equal(loaded.reconstruct(codes[:, :length]), rebuilt)


@pytest.mark.parametrize("name", QUICK)
def test_the_vectors_of_codes_are_read_from_the_artefact(tmp_path, name):
    """Those of quantizers without a decoder add up to the embeddings."""
    config = {"quantizer": name, "codebook_sizes": [5, 4], "quantizer_options": QUICK[name], "seed": 3}
    quantizer, new = quantized(tmp_path / "index", name, config)
    codes, books = quantizer.encode(new), load_codewords(tmp_path / "index", 2)
    assert [len(book) for book in books] == [5, 4]
    assert len({book.shape[1] for book in books}) == 1
    if name not in ("rq_vae", "mixture"):
        total = books[0][codes[:, 0]] + books[1][codes[:, 1]]
        np.testing.assert_allclose(total + quantizer.state().get("mean", 0), quantizer.reconstruct(codes), atol=1e-5)


def test_a_quantizer_without_vectors_that_add_up_is_named(tmp_path):
    save_file({"weights": np.zeros(2, np.float32)}, tmp_path / "quantizer.safetensors")
    with pytest.raises(UserError, match=r"its quantizer keeps no vectors of codes that add up \('codebook_0'\)$"):
        load_codewords(tmp_path, 2)
    (tmp_path / "quantizer.safetensors").unlink()
    with pytest.raises(UserError, match="imported index has no embeddings"):
        load_codewords(tmp_path, 2)


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("wrong", [{"codebook_sizes": [5, 4, 3]}, {"codebook_sizes": [5, 3]}, {"quantizer": "none"}])
def test_a_state_of_another_quantizer_is_refused(tmp_path, name, wrong):
    config = {"quantizer": name, "codebook_sizes": [5, 4], "quantizer_options": QUICK[name], "seed": 3} | wrong
    quantized(tmp_path / "index", name, config)
    with pytest.raises(UserError, match=r"index does not hold what its quantizer \w+ saves"):
        load_quantizer(tmp_path / "index")


def test_an_imported_index_has_no_embeddings(tmp_path):
    for load in (load_embeddings, load_quantizer):
        with pytest.raises(UserError, match="imported index has no embeddings"):
            load(tmp_path)


def write_json(path: Path, table: object) -> Path:
    path.write_text(json.dumps(table))
    return path


def test_external_codes_that_collide_get_our_disambiguation(tmp_path):
    path = write_json(tmp_path / "i.json", {"0": ["<a_5>", "<b_1>"], "1": ["<a_2>", "<b_0>"], "2": ["<a_5>", "<b_1>"]})
    index = external_index(path, 3)
    assert index.tuples() == [(5, 1, 0), (2, 0), (5, 1, 1)]
    assert index.level_sizes == (6, 2, 2)
    np.testing.assert_array_equal(external_sids(path, 3), [0, 1, 0])


def test_an_external_fourth_token_becomes_the_disambiguation(tmp_path):
    table = {
        "0": ["<|a_1|>", "<|b_0|>"],
        "1": ["<|a_1|>", "<|b_1|>", "<|c_4|>"],
        "2": ["<|a_1|>", "<|b_1|>", "<|c_2|>"],
    }
    path = write_json(tmp_path / "i.json", table)
    index = external_index(path, 3)
    assert index.tuples() == [(1, 0), (1, 1, 4), (1, 1, 2)]
    assert index.level_sizes == (2, 2, 5)
    np.testing.assert_array_equal(external_sids(path, 3), [0, 1, 2])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"0": ["<a_1>"]}, r"has 1 items, the catalogue numbers 0\.\.1"),
        ({"0": ["<a_1>"], "2": ["<a_1>"]}, "has 2 items, the catalogue"),
        ([["<a_1>"], ["<a_2>"]], "has list, the catalogue"),
        ({"0": ["<a_1>"], "1": ["a1"]}, "item 1 has 'a1' on level 0"),
        ({"0": ["<a_1>"], "1": ["<b_1>"]}, "item 1 has '<b_1>' on level 0"),
        ({"0": ["<a_1>"], "1": "<a_1>x"}, "item 1 has '<a_1>x'"),
        ({"0": ["<a_1>"], "1": ["<a_2>", "<b_1>", "<c_1>"]}, r"items have \[1, 3\] tokens"),
        ({"0": [], "1": []}, r"items have \[0\] tokens"),
        ({"0": ["<a_1>"], "1": ["<a_1>", "<b_0>"]}, "items 0 and 1 have the codes"),
    ],
)
def test_external_files_of_another_form_are_refused(tmp_path, table, message):
    with pytest.raises(UserError, match=message):
        external_index(write_json(tmp_path / "i.json", table), 2)


def test_external_files_that_are_missing_or_no_json(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        external_sids(tmp_path / "missing.json", 1)
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        external_sids(tmp_path / "x.json", 1)


@needs_industrial
def test_published_industrial_ids():
    sids = external_sids(INDUSTRIAL / "Industrial_and_Scientific.index.json", 3686)
    assert len(np.unique(sids)) == 3670
    assert sids[181] == sids[182]
    index = external_index(INDUSTRIAL / "Industrial_and_Scientific.index.json", 3686)
    assert index.depth == 3
    assert (index.codes[:, -1] >= 0).sum() == 31
    deduplicated = external_index(INDUSTRIAL / "Industrial_and_Scientific.index.dedup4.json", 3686)
    assert deduplicated.depth == 3
    assert (deduplicated.codes[:, -1] >= 0).sum() == 683
    assert len(set(deduplicated.tuples())) == 3686


@settings(max_examples=100, deadline=None)
@given(arrays(np.int64, st.tuples(st.integers(0, 20), st.integers(1, 4)), elements=st.integers(-1, 1 << 40)))
def test_row_keys_are_equal_where_rows_are_and_in_their_order(codes: np.ndarray) -> None:
    """Products of so many codes do not fit into a number."""
    _, first, group, count = np.unique(codes, axis=0, return_index=True, return_inverse=True, return_counts=True)
    found = np.unique(row_keys(codes), return_index=True, return_inverse=True, return_counts=True)
    for expected, got in zip((first, group.reshape(-1), count), found[1:], strict=True):
        np.testing.assert_array_equal(got, expected)
