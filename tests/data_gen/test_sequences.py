"""Training sequences that a file holds: what they are, and when the file is written."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonrec.data_gen.schema import Dataset
from reasonrec.data_gen.sequences import Sequences, write

LISTS = [[5, 6], [], [7], [1, 2, 3]]


def frame(lists: list[list[int]]) -> pl.DataFrame:
    return pl.DataFrame({"items": lists}, schema={"items": pl.List(pl.Int32)})


def as_lists(sequences: Sequences) -> list[list[int]]:
    return [items.tolist() for items in sequences]


@pytest.mark.parametrize("lists", [LISTS, []])
def test_a_table_and_a_file_hold_the_same(lists: list[list[int]], tmp_path: Path) -> None:
    write(tmp_path / "a.npy", len(lists), [frame(lists[:1]), frame(lists[1:])])
    mapped, held = Sequences.mapped(tmp_path / "a.npy", len(lists)), Sequences.of(frame(lists))
    for found in (mapped, held, Sequences.of([np.array(one, dtype=np.int64) for one in lists])):
        assert as_lists(found) == lists
        assert found.lengths.tolist() == [len(one) for one in lists]
        assert as_lists(pickle.loads(pickle.dumps(found))) == lists
    assert len(pickle.dumps(mapped)) < 500, "another process maps the file, it is not sent"
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]


def test_a_sequence_is_a_copy_in_int64() -> None:
    found = Sequences.of(frame(LISTS))
    assert found[-1].dtype == np.int64
    found[3][0] = 9
    assert found[-1].tolist() == [1, 2, 3]
    assert [items.tolist() for items in found[2:]] == [[7], [1, 2, 3]]
    with pytest.raises(IndexError):
        found[4]


@given(
    lists=st.lists(st.lists(st.integers(0, 9), max_size=7), min_size=1, max_size=9),
    parts=st.lists(st.tuples(*[st.integers(0, 99)] * 3), max_size=9),
)
def test_parts_add_up(lists: list[list[int]], parts: list[tuple[int, int, int]]) -> None:
    sizes = np.arange(2, 12)
    chosen = sorted((one % len(lists), a, b) for one, a, b in parts)
    chosen = [(one, *sorted((a % (len(lists[one]) + 1), b % (len(lists[one]) + 1)))) for one, a, b in chosen]
    columns = np.array(chosen, dtype=np.int64).reshape(-1, 3).T
    expected = [sum(sizes[lists[one][a:b]]) for one, a, b in chosen]
    assert Sequences.of(frame(lists)).sums(sizes, *columns).tolist() == expected


def test_a_dataset_writes_its_file_once_and_again_where_it_is_damaged(tiny_dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    folder.symlink_to(tiny_dataset)
    (tmp_path / f"dataset.sequences-{'0' * 16}.npy").write_bytes(b"of another dataset of this name")
    dataset = Dataset.load(folder)
    expected = dataset.train["items"].to_list()
    assert as_lists(Dataset.load(folder).sequences) == expected
    (file,) = tmp_path.glob("dataset.sequences-*")
    written = file.stat().st_mtime_ns, file.read_bytes()
    assert as_lists(Dataset.load(folder).sequences) == expected
    assert file.stat().st_mtime_ns == written[0], "it is kept"
    for damage in (written[1][:-4], b"", written[1][:200]):
        file.write_bytes(damage)
        assert as_lists(Dataset.load(folder).sequences) == expected
        assert file.read_bytes() == written[1]
    assert as_lists(dataset.sequences) == expected, "of the table, where it has been read"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dataset", file.name]


def test_where_nothing_can_be_written_the_file_is_a_temporary_one(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "dataset"
    elsewhere.mkdir()
    shutil.copytree(tiny_dataset, folder)  # another test may have made the file beside the one that all share
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    dataset = Dataset.load(folder)
    found = dataset.sequences
    assert list(elsewhere.glob("sequences-*/*.npy"))
    assert as_lists(found) == dataset.train["items"].to_list()
    del dataset, found
    assert not list(elsewhere.iterdir())
    assert set(tmp_path.iterdir()) == {folder, elsewhere}, "nothing was written beside the dataset"
