"""From histories to lists with a recommender that was never trained: what it skips, refuses, and keeps in step."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from reasonrec.data_gen.histories import UserHistory
from reasonrec.data_gen.schema import Dataset, write_dataset
from reasonrec.recipes.decoding import search as decode
from reasonrec.recipes.decoding.prefix import padded
from reasonrec.recipes.decoding.score import score_all_items
from reasonrec.recipes.models.checkpoint import Setting
from reasonrec.recipes.policies.base import build_policy
from reasonrec.recipes.policies.loading import load_fresh
from reasonrec.recipes.rankers.reasoning import Reasoner, Thinking
from reasonrec.recipes.recommend import given_history, known_history
from reasonrec.recipes.recommender import Recommender
from reasonrec.recipes.trainers.validation import build_probe
from reasonrec.tokenizers.artefact import staged
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.index import ItemIndex, build_index
from reasonrec.tokenizers.terminal import shown

HISTORIES = [[3, 1, 4], [1], [5, 9, 2, 6, 5, 3, 5, 8], [7, 7]]


@pytest.fixture(scope="module")
def recommender(tiny_base: Path, tiny_dataset: Path, tiny_index: Path) -> Recommender:
    setting = Setting(str(tiny_base), "full", "History:{history} Next:", False, None, 5)
    policy = build_policy(Dataset.load(tiny_dataset).catalogue(ItemIndex.load(tiny_index)), setting)
    torch.manual_seed(0)
    model, _ = load_fresh(setting, policy)
    return Recommender(policy, model, setting)


def test_unknown_items_are_skipped_and_counted(recommender):
    n = recommender.policy.index.n_items
    with pytest.warns(UserWarning, match=rf"3 items in 2 histories are not in the catalogue \(0..{n - 1}\): unknown"):
        items, scores = recommender.rank([[3, n, 1, 4, -1], [1], [n + 5, 7, 7]], k=4)
    expected, expected_scores = recommender.rank([[3, 1, 4], [1], [7, 7]], k=4)
    assert (items == expected).all()
    np.testing.assert_allclose(scores, expected_scores, atol=1e-5)
    with pytest.raises(UserError, match="3 items in 2 histories"):
        recommender.rank([[3, n, 1, 4, -1], [1], [n + 5, 7, 7]], k=4, strict=True)


def test_empty_histories_are_ranked_by_the_prompt_alone(recommender):
    with pytest.warns(UserWarning, match="2 of 3 histories are empty"):
        items, _ = recommender.rank([[], [1], [-7]], k=4)
    assert (items >= 0).all()
    assert (items[0] == items[2]).all()
    with pytest.raises(UserError, match="1 of 2 histories are empty"):
        recommender.rank([[], [1]], k=4, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recommender.rank([[1]], k=4, strict=True)
        assert recommender.rank([], k=4)[0].shape == (0, 4)


@pytest.mark.parametrize("exhaustive", [True, False])
def test_lists_are_those_of_the_reference(recommender, exhaustive):
    """However narrow the search is."""
    policy, trie = recommender.policy, recommender.policy.trie
    items, scores = recommender.rank(HISTORIES, k=20, num_beams=20, exhaustive=exhaustive, batch_size=3)
    ids, mask = padded(recommender.prompts(HISTORIES), policy.pad_id, recommender.model.device)
    every = score_all_items(
        recommender.model,
        trie,
        policy.vocabulary,
        ids,
        mask,
        item_token_ids=policy.vocabulary.item_token_ids(policy.index.codes),
    )
    best = every.sort(dim=1, descending=True)
    np.testing.assert_allclose(scores, best.values[:, :20], atol=1e-4)
    np.testing.assert_allclose(every.gather(1, torch.from_numpy(items)), scores, atol=1e-4)


def test_lists_that_are_not_proven_are_counted(recommender, monkeypatch):
    few = {"k": 1, "num_beams": 1}
    exact, _ = recommender.rank(HISTORIES, **few)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a beam search promises nothing
        beam, _ = recommender.rank(HISTORIES, exact=False, **few)
    assert not (exact == beam).all()
    monkeypatch.setattr(decode, "PATIENCE", 1)
    with pytest.warns(UserWarning, match=r"[1-4] of 4 lists may lack an item .*; raise num_beams=1 to"):
        recommender.rank(HISTORIES, **few)


def test_lists_longer_than_what_is_allowed_and_everything_masked(recommender):
    n = recommender.policy.index.n_items
    exclude = [list(range(3, n)), list(range(n))]
    items, scores = recommender.rank([[1], [2]], k=n + 2, num_beams=n + 2, exclude=exclude)
    assert sorted(items[0][:3]) == [0, 1, 2]
    assert (items[0][3:] == -1).all()
    assert (items[1] == -1).all()
    assert np.isneginf(scores[1]).all()
    with pytest.raises(UserError, match="1 lists for 2 histories"):
        recommender.rank([[1], [2]], exclude=[[1]])
    with pytest.raises(UserError, match=f"excluded item {n} is not in the catalogue"):
        recommender.rank([[1]], exclude=[[n]])


def test_a_prompt_beyond_the_context_names_the_remedy(recommender, monkeypatch):
    monkeypatch.setattr(recommender.model.config, "max_position_embeddings", 12)
    with pytest.raises(UserError, match="sees at most 12: lower max_history"):
        recommender.rank(HISTORIES, k=3)


def test_a_followed_user_gets_what_a_fresh_history_gets(recommender):
    session = recommender.session([3, 1], num_beams=20)
    history = [3, 1]
    for item in (4, 9, 2, 6, 5):  # the window of five fills up
        session.append(item)
        history.append(item)
        found = session.search(k=6)
        items, scores = recommender.rank([history], k=6, num_beams=20)
        assert (found.items.numpy() == items).all()
        np.testing.assert_allclose(found.scores, scores, atol=1e-5)
    with pytest.raises(UserError, match="is not in the catalogue"):
        session.append(-1)


# --- what is masked is not what is shown --------------------------------------------------------------------------

HAD = [3, 8, 1, 20, 15, 2, 30, 31, 32]  # by user 0, oldest first; the last two were held out
CUT = 2  # items of a held-out history that the data set keeps
SHOWN = 3  # of the model's `max_history`


@pytest.fixture(scope="module")
def masking_data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A data set with `mask_history` whose held-out histories are cut to two items."""
    from reasonrec.data_gen.schema import Tables
    from reasonrec.data_gen.splits import TEST, VALID, held_out_rows, leave_one_out, train_sequences

    folder = tmp_path_factory.mktemp("masking")
    users = {0: HAD, 1: [5, 6, 7, 9], 2: [11, 4]}
    log = pl.DataFrame(
        [(user, item, time) for user, items in users.items() for time, item in enumerate(items)],
        schema={"user": pl.Int32, "item": pl.Int32, "timestamp": pl.Int64},
        orient="row",
    )
    labels = leave_one_out(log["user"].to_numpy())
    tables = Tables(
        items=pl.DataFrame(
            {
                "item": range(40),
                "item_id": [str(i + 100) for i in range(40)],
                "title": [f"thing {i}" for i in range(40)],
                **dict.fromkeys(("description", "category", "brand"), ""),
            }
        ),
        users=pl.DataFrame({"user": range(3), "user_id": ["long", "short", "new"]}),
        train=train_sequences(log, labels),
        valid=held_out_rows(log, labels, VALID, mask_history=True, max_history=CUT),
        test=held_out_rows(log, labels, TEST, mask_history=True, max_history=CUT),
        facts={"name": "masking", "split": "leave_one_out", "mask_history": True, "order": "time", "repeats": False},
    )
    with staged(folder / "dataset", kind="dataset", config={}) as (work, facts):
        facts.update(write_dataset(work, tables))
    return Dataset.load(folder / "dataset")


@pytest.fixture(scope="module")
def masking(tiny_base: Path, masking_data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Recommender:
    """On that data set."""
    folder, dataset = tmp_path_factory.mktemp("masking"), masking_data
    with staged(folder / "index", kind="index", config={}, inputs={"dataset": dataset.manifest.hash}) as (work, _):
        build_index(np.stack(np.divmod(np.arange(40), 8), axis=1), [5, 8]).save(work)
    setting = Setting(str(tiny_base), "full", "History:{history}", False, None, SHOWN)
    policy = build_policy(dataset.catalogue(ItemIndex.load(folder / "index")), setting)
    torch.manual_seed(0)
    model, _ = load_fresh(setting, policy)
    return Recommender(policy, model, setting)


def rest(*had: int) -> set[int]:
    """The whole catalogue without these items."""
    return set(range(40)) - set(had)


def test_a_known_user_is_recommended_nothing_they_had_however_long_ago(masking, masking_data):
    dataset = masking_data
    assert dataset.test["history"].to_list()[0] == HAD[-3:-1], "cut by prepare"
    user = known_history(dataset, "long")
    assert user.shown.tolist() == HAD[-3:]
    assert user.masked.tolist() == sorted(HAD)
    items, _ = masking.rank([user], k=40, num_beams=40)
    assert set(items[0][items[0] >= 0]) == rest(*HAD)
    assert known_history(dataset, "new").masked.tolist() == [4, 11], "of training alone"


def test_masking_follows_the_data_set_unless_told(masking, recommender):
    everything = {"k": 40, "num_beams": 40}
    items, _ = masking.rank([HAD, [5]], **everything)
    assert set(items[0][items[0] >= 0]) == rest(*HAD), "what a prompt of three items does not show is masked too"
    assert set(items[1][items[1] >= 0]) == rest(5)
    items, _ = masking.rank([HAD], exclude=[[0, 3]], **everything)
    assert set(items[0][items[0] >= 0]) == rest(0, *HAD), "further items, on top of what the user had"
    items, _ = masking.rank([HAD], repeats=True, **everything)
    assert set(items[0]) == rest()
    items, _ = masking.rank([HAD], repeats=True, exclude=[[0, 3]], **everything)
    assert set(items[0][items[0] >= 0]) == rest(0, 3)
    n = recommender.policy.index.n_items  # this data set masks nothing
    assert (recommender.rank([[1, 2]], k=n, num_beams=n)[0] >= 0).all()
    assert (recommender.rank([[1, 2]], k=n, num_beams=n, repeats=False)[0] < 0).sum() == 2


def test_reasoning_masks_alike(masking, masking_data):
    reasoner, thinking = Reasoner(masking, k=40, num_beams=40), Thinking(2, 3)
    user = known_history(masking_data, "long")
    own = reasoner([user, HAD], thinking)
    for items in (
        *own.items,
        *reasoner.behind([user, HAD], own.chains),
        *reasoner.variants([user, HAD], 2),
    ):
        assert set(items[items >= 0]) == rest(*HAD)
    assert set(reasoner([HAD], thinking, repeats=True).items[0]) == rest()


def test_a_followed_user_keeps_what_left_the_window_masked(masking, masking_data):
    session = masking.session(HAD[:4])
    for item in HAD[4:]:
        session.append(item)
    found = session.search(k=40, num_beams=40).items[0].numpy()
    assert set(found[found >= 0]) == rest(*HAD)
    assert session.history.masked.tolist() == sorted(HAD)
    cut = masking.session(known_history(masking_data, "long")).search(k=40, num_beams=40).items[0].numpy()
    assert set(cut[cut >= 0]) == rest(*HAD)
    assert set(masking.session(HAD, repeats=True).search(k=40, num_beams=40).items[0].tolist()) == rest()


def test_the_probe_masks_what_the_cases_mask(masking, masking_data):
    policy = masking.policy
    probe = build_probe(policy, masking_data, 9, SHOWN)
    assert sorted(map(sorted, probe.exclude)) == sorted(masking_data.valid["masked"].to_list())
    assert max(map(len, probe.exclude)) > CUT


def test_rows_of_a_data_set_without_a_mask_still_know_what_was_shown():
    rows = pl.DataFrame(
        {"history": [[4, 2, 4]], "masked": [[]]}, schema={"history": pl.List(pl.Int32), "masked": pl.List(pl.Int32)}
    )
    (user,) = UserHistory.of_rows(rows)
    assert user.last(1).shown.tolist() == [4]
    assert user.last(1).masked.tolist() == [2, 4]
    assert user.then(9).masked.tolist() == [2, 4, 9]
    assert user.masked.tolist() == [2, 4], "a history does not change"


def test_raw_ids_that_nobody_knows(tiny_dataset):
    dataset = Dataset.load(tiny_dataset)
    known, catalogue = dataset.items["item_id"].to_list(), dataset.catalogue()
    text = f"{known[4]}, nobody ,{known[2]},nothing,"
    with pytest.warns(UserWarning, match=r"item nobody is not in the catalogue.*\(2 of 4 items are unknown"):
        assert given_history(catalogue, text, strict=False) == [4, 2]
    with pytest.raises(UserError, match="2 of 4 items are unknown"):
        given_history(catalogue, text, strict=True)


HUGE = 10**5000
NO_NUMBERS = [0, -1, True, 2.5, float("nan"), float("inf"), "3", None, [3], 10**30, HUGE]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=shown)
def test_numbers_of_a_search_are_whole_and_in_range(recommender, value):
    rule = r"=.* has to be a whole number, (at least 1|from 1 to [\d,]+)$"
    history = [[1, 2]]
    for exhaustive in (False, True):
        with pytest.raises(UserError, match=f"^k{rule}"):
            recommender.rank(history, k=value, exhaustive=exhaustive)
    with pytest.raises(UserError, match=f"^num_beams{rule}"):
        recommender.rank(history, num_beams=value)
    with pytest.raises(UserError, match=f"^num_beams{rule}"):
        recommender.session([1], num_beams=value)
    session = recommender.session([1])
    with pytest.raises(UserError, match=f"^k{rule}"):
        session.search(k=value)
    if value != 10**30:  # batches may be as large as they like
        with pytest.raises(UserError, match=f"^batch_size{rule}"):
            recommender.rank(history, batch_size=value)
        with pytest.raises(UserError, match=f"^chains{rule}"):
            Thinking(value)
    if value is not None:
        with pytest.raises(UserError, match=f"^num_beams{rule}"):
            session.search(k=1, num_beams=value)
    assert session.tokens_read == 0, "refused before anything is read"
    with pytest.raises(UserError, match=f"^k{rule}"):
        Reasoner(recommender, value)
    with pytest.raises(UserError, match=f"^num_beams{rule}"):
        Reasoner(recommender, 5, value)


def test_chains_may_propose_fewer_items_than_the_list_holds(recommender):
    items = Reasoner(recommender, 5, 2)([[1, 2]], Thinking(3, 4)).items
    assert items.shape == (1, 5)
    assert (items[0][:2] >= 0).all()


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf"), "1", None])
def test_a_temperature_is_finite_and_above_zero(temperature):
    with pytest.raises(UserError, match="has to be a finite number above 0"):
        Thinking(temperature=temperature)


@pytest.mark.parametrize("histories", [None, 5, "12", b"12", {"a": [1]}, 1.5])
def test_histories_are_a_list(recommender, histories):
    with pytest.raises(UserError, match=r"^histories=.* has to be a list with one list of items for each user"):
        recommender.rank(histories)
    if histories is not None:
        with pytest.raises(UserError, match=r"^exclude=.* has to be a list with one list of items for each user"):
            recommender.rank([[1]], exclude=histories)


@pytest.mark.parametrize(
    "history",
    [[float("nan")], [None], [[1]], [b"1"], [1, None], None, 5, "12", b"12", {1: 2}, [HUGE, None], ["a", HUGE]],
)
def test_a_history_is_a_list_of_items(recommender, history):
    for use in (
        lambda: recommender.rank([history]),
        lambda: recommender.rank([[1]], exclude=[history]),
        lambda: recommender.session(history),
    ):
        with pytest.raises(UserError, match=r"is no item|is no list|mixes text and numbers"):
            use()


@pytest.mark.parametrize("item", [-1, 10**6, 10**30, HUGE, np.uint64(2**64 - 1), "\ud800", "a\0\x1b[1m"], ids=shown)
def test_an_item_out_of_the_catalogue(recommender, item):
    with pytest.raises(UserError, match=r"^excluded item .* is not in the catalogue") as caught:
        recommender.rank([[1]], exclude=[iter([item])])
    assert str(caught.value).isprintable()
    with pytest.raises(UserError, match=r"^item .* is not in the catalogue"):
        recommender.session([1]).append(item)
    with pytest.raises(UserError, match=r"^excluded item .* is not in the catalogue"):
        recommender.session([1]).search(k=1, exclude=[[item]])
    with pytest.warns(UserWarning, match="1 items in 1 histories are not in the catalogue"):
        recommender.rank([[item]], k=1)


def test_lists_of_arrays_and_generators_are_lists(recommender):
    expected, _ = recommender.rank([[1, 2], [3, 4]], k=3, exclude=[[5], [6]])
    for given in (np.array([[1, 2], [3, 4]]), torch.tensor([[1, 2], [3, 4]]), (h for h in ([1, 2], (3, 4)))):
        found, _ = recommender.rank(given, k=np.int64(3), exclude=iter([[5], [6]]), batch_size=np.int32(1))
        assert (found == expected).all()
