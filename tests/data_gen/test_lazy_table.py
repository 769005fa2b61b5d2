"""Tables that are read when they are asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from reasonrec.data_gen.lazy_table import read_parts, sample_rows
from reasonrec.data_gen.schema import Dataset


@pytest.fixture
def table() -> pl.DataFrame:
    return pl.DataFrame({"row": range(100), "word": [f"w{n}" for n in range(100)]})


def test_parts(table: pl.DataFrame, tmp_path: Path) -> None:
    table.write_parquet(tmp_path / "t.parquet", row_group_size=30)
    parts = list(read_parts(tmp_path / "t.parquet", ["word"], rows=40))
    assert [part.height for part in parts] == [40, 40, 20]
    assert pl.concat(parts).equals(table.select("word"))


@pytest.mark.parametrize("n", [0, 1, 17, 100, 1000])
def test_a_sample_is_that_of_the_frame(
    table: pl.DataFrame, n: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reasonrec.data_gen.lazy_table.read_parts", lambda *given: read_parts(*given, rows=7))
    table.write_parquet(tmp_path / "t.parquet")
    for source in (table, tmp_path / "t.parquet"):
        found = sample_rows(source, ["word", "row"], n, seed=3)
        assert found.equals(table.sample(min(n, 100), seed=3).select("word", "row"))


def test_a_table_of_a_dataset_is_read_when_it_is_asked_for(tiny_dataset: Path) -> None:
    dataset = Dataset.load(tiny_dataset)
    expected = pl.read_parquet(tiny_dataset / "valid.parquet")
    assert isinstance(vars(dataset)["valid"], Path)
    assert dataset.sample("valid", *expected.columns, n=5, seed=0).equals(expected.sample(5, seed=0))
    assert isinstance(vars(dataset)["valid"], Path), "a sample keeps nothing"
    assert dataset.valid.equals(expected)
    assert dataset.valid is dataset.valid
    assert replace(dataset, valid=expected.clear()).valid.height == 0
    assert dataset.n_users == dataset.users.height
