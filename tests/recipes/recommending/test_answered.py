"""Raw ids in and items out: one user or several, arrays of any library, both modes, the lists of the evaluation."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from reasonrec.data_gen.histories import UserHistory
from reasonrec.data_gen.schema import Dataset
from reasonrec.recipes.models.verdict import UNMEASURED, Verdict
from reasonrec.recipes.recommender import Recommender
from reasonrec.recipes.recommending.answered import Arrays, Recommendation
from reasonrec.tokenizers.errors import UserError


@pytest.fixture(scope="module")
def recommender(adapter: Path) -> Recommender:
    return Recommender.from_pretrained(adapter, dtype="fp32", device="cpu")


@pytest.fixture(scope="module")
def ids(recommender: Recommender) -> list[str]:
    return recommender.policy.catalogue.item_ids


def test_a_history_of_ids_gives_items(recommender: Recommender, ids: list[str]) -> None:
    found = recommender.recommend(ids[:3], k=4)
    items, scores = recommender.rank([ids[:3]], k=4)
    titles = recommender.policy.catalogue.titles
    assert found == [Recommendation(ids[i], titles[i], float(s)) for i, s in zip(items[0], scores[0], strict=True)]
    assert [item.score for item in found] == sorted((item.score for item in found), reverse=True)
    several = recommender.recommend([ids[:3], ids[5:6]], k=4)
    assert [item.id for item in several[0]] == [item.id for item in found]
    # Another batch rounds otherwise.
    np.testing.assert_allclose([item.score for item in several[0]], [item.score for item in found], atol=1e-5)
    assert recommender.recommend(UserHistory.of([0, 1, 2]), k=4) == found
    assert recommender.recommend([0, 1, 2], k=4) == found


def test_arrays_of_any_library_are_histories(recommender: Recommender, ids: list[str]) -> None:
    words, lists = ids[:3], [ids[:3], ids[5:7]]
    one, many = recommender.recommend(words, k=3), recommender.recommend(lists, k=3)
    for given in (np.array(words), np.array(words, dtype=object), pa.array(words), pa.chunked_array([words]),
                  pl.Series(words), tuple(words), iter(words)):  # fmt: skip
        assert recommender.recommend(given, k=3) == one
    for given in (
        pa.array(lists),
        pl.Series(lists),
        [np.array(row) for row in lists],
        [pa.array(row) for row in lists],
    ):
        assert recommender.recommend(given, k=3) == many
    assert recommender.recommend(np.array([[0, 1], [2, 3]]), k=3) == recommender.recommend([[0, 1], [2, 3]], k=3)
    assert (recommender.rank(pa.array(lists), k=3)[0] == recommender.rank(lists, k=3)[0]).all()


def test_arrays_come_out_on_request(recommender: Recommender, ids: list[str]) -> None:
    lists = [ids[:3], ids[5:7]]
    found = recommender.recommend(lists, k=3, arrays=True)
    assert isinstance(found, Arrays)
    expected = recommender.recommend(lists, k=3)
    assert found.ids.tolist() == [[item.id for item in row] for row in expected]
    assert found.titles.tolist() == [[item.title for item in row] for row in expected]
    assert found.scores.shape == (2, 3)
    assert recommender.recommend(lists[0], k=3, arrays=True).ids.tolist() == found.ids[0].tolist()
    everything = recommender.recommend(ids[:40], k=48, repeats=False, arrays=True)
    assert everything.ids[8:].tolist() == [None] * 40
    assert len(recommender.recommend(ids[:40], k=48, repeats=False)) == 8, "a list ends where the catalogue does"


def test_unknown_ids_are_counted_once_or_refused(recommender: Recommender, ids: list[str]) -> None:
    lists = [["nobody", *ids[:2]], ["nor me", "nor I", ids[5]]]
    with pytest.warns(UserWarning, match="3 items in 2 histories are not in the catalogue") as caught:
        found = recommender.recommend(lists, k=3)
    assert len(caught) == 1
    assert found == recommender.recommend([ids[:2], ids[5:6]], k=3)
    with pytest.raises(UserError, match="3 items in 2 histories"):
        recommender.recommend(lists, strict=True)


def test_mistakes_are_named(recommender: Recommender, ids: list[str]) -> None:
    with pytest.raises(UserError, match=r"mixes items and lists"):
        recommender.recommend([ids[0], ids[:2]])
    with pytest.raises(UserError, match=r"is no list"):
        recommender.recommend(ids[0])
    with pytest.raises(UserError, match=r"mode='thinking' has to be direct or reasoning"):
        recommender.recommend(ids[:2], mode="thinking")  # type: ignore[call-overload]
    with pytest.raises(UserError, match="exhaustive is for mode=direct"):
        recommender.recommend(ids[:2], mode="reasoning", exhaustive=True)
    with pytest.raises(UserError, match=r"k=0 has to be a whole number"):
        recommender.recommend(ids[:2], k=0)


def test_it_thinks_only_where_that_was_shown_to_help(
    recommender: Recommender, ids: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    history, chain = ids[:3], {"max_chain": 5}
    with pytest.warns(UserWarning, match=r"not measured on this checkpoint .*; unproven=True thinks all the same"):
        at_once = recommender.recommend(history, k=3, mode="reasoning", **chain)
    assert at_once == recommender.recommend(history, k=3)
    with pytest.warns(UserWarning, match="items at once instead"):
        explained = recommender.explain(history, k=3, **chain)
    assert explained.thoughts == []
    assert explained.note.startswith(UNMEASURED)
    assert explained.recommendations == at_once
    pays = Verdict(0.2, 0.1, 0.01, 0.0, 9, 1, 5, [1, 1], "")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asked = recommender.explain(history, k=3, unproven=True, **chain)
        monkeypatch.setattr(recommender, "verdict", pays)
        thought = recommender.explain(history, k=3, **chain)
        behind = recommender.recommend(history, k=3, mode="reasoning", **chain)
    assert thought == asked
    assert len(thought.thoughts) == 1
    assert thought.recommendations == behind
    assert [item.score for item in behind] != [item.score for item in at_once]


def test_the_lists_are_those_of_the_evaluation(
    recommender: Recommender, adapter: Path, tiny_dataset: Path, stage, tmp_path: Path
) -> None:
    flags = ["--sasrec_trials", "0", "--control", "false", "--precision", "fp32", "--num_beams", "20"]
    stage("eval_ranking", "--dataset", str(tiny_dataset), "--models", str(adapter), *flags,
          "--output_dir", str(tmp_path / "report"))  # fmt: skip
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    (row,) = [row for row in metrics["rows"] if row["mode"] == "direct"]
    data, names = Dataset.load(tiny_dataset), recommender.policy.catalogue.item_ids
    lists = recommender.recommend([[names[i] for i in history] for history in data.test["history"]], k=20)
    places = [
        [item.id for item in found].index(names[target]) if names[target] in {item.id for item in found} else 99
        for found, target in zip(lists, data.test["target"], strict=True)
    ]
    assert np.mean([place < 10 for place in places]) == row["metrics"]["hr@10"]
    gains = [1 / np.log2(place + 2) if place < 20 else 0 for place in places]
    assert np.mean(gains) == pytest.approx(row["metrics"]["ndcg@20"])


def test_a_session_recommends_items(recommender: Recommender, ids: list[str]) -> None:
    session = recommender.session(ids[:2], num_beams=20)
    session.append(ids[2])
    found, expected = session.recommend(k=4), recommender.recommend(ids[:3], k=4)
    assert [item.id for item in found] == [item.id for item in expected]
    assert [item.score for item in found] == pytest.approx([item.score for item in expected], abs=1e-4)
