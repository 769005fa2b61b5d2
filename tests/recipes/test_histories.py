"""From histories to lists with a recommender that was never trained: what it skips, refuses, and keeps in step."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from reasonrec.data_gen.schema import Dataset
from reasonrec.recipes.bundle import Bundle, Setting, load_with_rows
from reasonrec.recipes.recommend import given_history
from reasonrec.recipes.recommender import Recommender
from reasonrec.tokenizers import decode
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.index import ItemIndex
from reasonrec.tokenizers.score import score_all_items

HISTORIES = [[3, 1, 4], [1], [5, 9, 2, 6, 5, 3, 5, 8], [7, 7]]


@pytest.fixture(scope="module")
def recommender(tiny_base: Path, tiny_dataset: Path, tiny_index: Path) -> Recommender:
    setting = Setting(str(tiny_base), "full", "History:{history} Next:", False, None, 5)
    bundle = Bundle.build(Dataset.load(tiny_dataset), ItemIndex.load(tiny_index), setting)
    torch.manual_seed(0)
    model, _ = load_with_rows(setting, bundle)
    return Recommender(bundle, model, setting)


def test_unknown_items_are_skipped_and_counted(recommender):
    n = recommender.bundle.index.n_items
    with pytest.warns(UserWarning, match=rf"3 items in 2 histories are not in the catalogue \(0..{n - 1}\): unknown"):
        items, scores = recommender.recommend([[3, n, 1, 4, -1], [1], [n + 5, 7, 7]], k=4)
    expected, expected_scores = recommender.recommend([[3, 1, 4], [1], [7, 7]], k=4)
    assert (items == expected).all()
    np.testing.assert_allclose(scores, expected_scores, atol=1e-5)
    with pytest.raises(UserError, match="3 items in 2 histories"):
        recommender.recommend([[3, n, 1, 4, -1], [1], [n + 5, 7, 7]], k=4, strict=True)


def test_empty_histories_are_ranked_by_the_prompt_alone(recommender):
    with pytest.warns(UserWarning, match="2 of 3 histories are empty"):
        items, _ = recommender.recommend([[], [1], [-7]], k=4)
    assert (items >= 0).all()
    assert (items[0] == items[2]).all()
    with pytest.raises(UserError, match="1 of 2 histories are empty"):
        recommender.recommend([[], [1]], k=4, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recommender.recommend([[1]], k=4, strict=True)
        assert recommender.recommend([], k=4)[0].shape == (0, 4)


@pytest.mark.parametrize("exhaustive", [True, False])
def test_lists_are_those_of_the_reference(recommender, exhaustive):
    """However narrow the search is."""
    bundle, trie = recommender.bundle, recommender.bundle.trie
    items, scores = recommender.recommend(HISTORIES, k=20, num_beams=20, exhaustive=exhaustive, batch_size=3)
    ids, mask = recommender.prompts(HISTORIES)
    every = score_all_items(
        recommender.model,
        trie,
        bundle.vocabulary,
        ids,
        mask,
        item_token_ids=bundle.vocabulary.item_token_ids(bundle.index.codes),
    )
    best = every.sort(dim=1, descending=True)
    np.testing.assert_allclose(scores, best.values[:, :20], atol=1e-4)
    np.testing.assert_allclose(every.gather(1, torch.from_numpy(items)), scores, atol=1e-4)


def test_lists_that_are_not_proven_are_counted(recommender, monkeypatch):
    few = {"k": 1, "num_beams": 1}
    exact, _ = recommender.recommend(HISTORIES, **few)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a beam search promises nothing
        beam, _ = recommender.recommend(HISTORIES, exact=False, **few)
    assert not (exact == beam).all()
    monkeypatch.setattr(decode, "PATIENCE", 1)
    with pytest.warns(UserWarning, match=r"[1-4] of 4 lists may lack an item .*; raise num_beams=1 to"):
        recommender.recommend(HISTORIES, **few)


def test_lists_longer_than_what_is_allowed_and_everything_masked(recommender):
    n = recommender.bundle.index.n_items
    exclude = [list(range(3, n)), list(range(n))]
    items, scores = recommender.recommend([[1], [2]], k=n + 2, num_beams=n + 2, exclude=exclude)
    assert sorted(items[0][:3]) == [0, 1, 2]
    assert (items[0][3:] == -1).all()
    assert (items[1] == -1).all()
    assert np.isneginf(scores[1]).all()
    with pytest.raises(UserError, match="1 lists for 2 histories"):
        recommender.recommend([[1], [2]], exclude=[[1]])
    with pytest.raises(UserError, match=f"excluded item {n} is not in the catalogue"):
        recommender.recommend([[1]], exclude=[[n]])


def test_a_prompt_beyond_the_context_names_the_remedy(recommender, monkeypatch):
    monkeypatch.setattr(recommender.model.config, "max_position_embeddings", 12)
    with pytest.raises(UserError, match="sees at most 12: lower max_history"):
        recommender.recommend(HISTORIES, k=3)


def test_a_followed_user_gets_what_a_fresh_history_gets(recommender):
    state = recommender.state([3, 1], num_beams=20)
    history = [3, 1]
    for item in (4, 9, 2, 6, 5):  # the window of five fills up
        recommender.append(state, item)
        history.append(item)
        found = state.search(k=6, exclude=[history])
        items, scores = recommender.recommend([history], k=6, num_beams=20, exclude=[history])
        assert (found.items.numpy() == items).all()
        np.testing.assert_allclose(found.scores, scores, atol=1e-5)
    with pytest.raises(UserError, match="is not in the catalogue"):
        recommender.append(state, -1)


def test_raw_ids_that_nobody_knows(tiny_dataset):
    dataset = Dataset.load(tiny_dataset)
    known = dataset.items["item_id"].to_list()
    text = f"{known[4]}, nobody ,{known[2]},nothing,"
    with pytest.warns(UserWarning, match=r"item nobody is not in the catalogue.*\(2 of 4 items are unknown"):
        assert given_history(dataset, text, strict=False) == [4, 2]
    with pytest.raises(UserError, match="2 of 4 items are unknown"):
        given_history(dataset, text, strict=True)
