from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from reasonrec.data_gen.preview import describe
from reasonrec.data_gen.schema import (
    ITEMS,
    ROWS,
    TRAIN,
    Dataset,
    Tables,
    count_targets,
    empty_rows,
    to_lists,
    unique_ids,
    write_dataset,
)
from reasonrec.data_gen.seeded_hash import seeded_hash
from reasonrec.tokenizers.artefact import staged
from reasonrec.tokenizers.errors import UserError

FACTS = {"name": "tiny", "split": "given", "mask_history": True, "order": "sequence", "repeats": True}
FACTS |= {"filters": [], "notes": []}


HASHES = [14300560184641484674, 35586486336360408, 14300560184641484674]


def tiny(**changes: pl.DataFrame) -> Tables:
    frames = {
        "items": pl.DataFrame({"item": [0, 1, 2], "item_id": ["a", "b", "c"], "title": ["A", "B", "C"]}).with_columns(
            pl.lit("").alias(name) for name in ("description", "category", "brand")
        ),
        "users": pl.DataFrame({"user": [0], "user_id": ["u"]}),
        "train": pl.DataFrame({"user": [0], "items": [[0, 1, 0]], "first_target": [1]}),
        "valid": empty_rows(),
        "test": pl.DataFrame(
            {
                "row": [0],
                "user": [0],
                "history": [[0, 1]],
                "target": [2],
                "masked": [[0, 1]],
                "same_time": [False],
            }
        ),
    }
    return Tables(**(frames | changes), facts=FACTS)


def test_write_and_load(tmp_path: Path) -> None:
    with staged(tmp_path / "dataset", kind="dataset", config={}, seed=3) as (folder, facts):
        facts.update(write_dataset(folder, tiny()))
    dataset = Dataset.load(tmp_path / "dataset")
    assert dict(dataset.items.schema) == ITEMS
    assert dict(dataset.train.schema) == TRAIN
    assert dict(dataset.test.schema) == dict(dataset.rows("valid").schema) == ROWS
    # The first item is only ever history, so it does not count.
    assert dataset.items["train_count"].to_list() == [1, 1, 0]
    assert (dataset.n_items, dataset.n_users, dataset.facts["n_train_targets"]) == (3, 1, 2)
    assert "history masked" in describe(dataset.facts)
    with pytest.raises(UserError, match="'valid' and 'test'"):
        dataset.rows("train")  # type: ignore[arg-type]
    (tmp_path / "dataset" / "users.parquet").write_bytes(b"x")
    with pytest.raises(UserError, match="was changed"):
        Dataset.load(tmp_path / "dataset")


@pytest.mark.parametrize(
    ("name", "column", "value", "message"),
    [
        ("test", "target", 3, r"target has to lie in 0\.\.2"),
        ("test", "target", 1, "a target is masked"),
        ("test", "history", [0, -1], "history has to lie"),
        ("test", "history", [], "no list of history may be empty"),
        ("train", "user", 1, r"user has to lie in 0\.\.0"),
        ("train", "items", [7], "items has to lie"),
        ("items", "title", "", "have a title"),
    ],
)
def test_contradictions_are_found(tmp_path: Path, name: str, column: str, value: object, message: str) -> None:
    frame = getattr(tiny(), name)
    value = pl.Series([value] * frame.height, dtype=frame.schema[column])
    with pytest.raises(ValueError, match=message):
        write_dataset(tmp_path, tiny(**{name: frame.with_columns(value.alias(column))}))


def test_unknown_and_missing_columns(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"missing columns \['first_target'\], unknown columns \['extra'\]"):
        write_dataset(tmp_path, tiny(train=tiny().train.rename({"first_target": "extra"})))


def test_terms_of_the_data_go_with_the_catalogue(tmp_path: Path) -> None:
    closed = {"terms": "for research", "redistributable": False}
    for name, facts, expected in (("open", {}, {"terms": "", "redistributable": True}), ("closed", closed, closed)):
        tables = tiny()
        with staged(tmp_path / name, kind="dataset", config={}) as (folder, made):
            made.update(write_dataset(folder, replace(tables, facts={**tables.facts, **facts})))
        found = Dataset.load(tmp_path / name).catalogue().facts
        assert {key: found[key] for key in expected} == expected


def test_a_name_of_others_stays_on_its_line() -> None:
    counts = dict.fromkeys(("n_users", "n_items", "n_train_sequences", "n_train_targets", "n_valid", "n_test"), 1)
    said = describe({**FACTS, **counts, "name": "mine\n  users  9\x1b[1A"})
    assert said.splitlines()[0].endswith(r"mine\n  users  9\x1b[1A")
    assert len(said.splitlines()) == len(describe({**FACTS, **counts}).splitlines())


def test_count_targets() -> None:
    train = pl.DataFrame({"items": [[0, 1, 1], [2], [2, 0]], "first_target": [1, 0, 1]})
    assert count_targets(train, 4).tolist() == [1, 2, 1, 0]


def test_to_lists_with_empty_rows() -> None:
    assert to_lists(np.array([5, 6, 7]), np.array([0, 2, 0, 1, 0])).to_list() == [[], [5, 6], [], [7], []]
    assert to_lists(np.array([], dtype=np.int64), np.array([0, 0])).to_list() == [[], []]


def test_unique_ids() -> None:
    assert unique_ids(["10", "9", "10"]) == ["9", "10"]
    assert unique_ids(["10", "9", "b"]) == ["10", "9", "b"]


def test_seeded_hash_is_fixed_for_all_time() -> None:
    # A changed hash would silently reorder every dataset.
    words = pl.Series(["a", "b", "a"])
    assert seeded_hash(0, words).tolist() == HASHES
    assert seeded_hash(1, words).tolist() != HASHES
    assert seeded_hash(0, words, pl.Series([1, 1, 2]))[0] != seeded_hash(0, words, pl.Series([1, 1, 2]))[2]
