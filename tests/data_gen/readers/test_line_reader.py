"""What readers of files of one record a line share."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonrec.data_gen.readers import line_files
from reasonrec.data_gen.readers.csv_reader import LINE
from reasonrec.data_gen.readers.line_files import LineFile
from reasonrec.data_gen.readers.line_reader import interactions
from reasonrec.tokenizers.errors import UserError

NAMES = ("user_id", "item_id", "rating", "timestamp", "review")
SECONDS = [str(1_600_000_000 + at) for at in range(3)]
TIMES = [
    [*SECONDS, "4102444800"],
    [*SECONDS, "5", "", "x"],
    [*SECONDS, "1600000000123"],
    ["2020-05-01", "2021-05-01 10:00:00", "1950-01-01"],
    ["2020-05-01", "1950-01-01", "yesterday"],
    ["1", "2", "30"],
    ["20200501", "20210501"],
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lines") / "log.txt"


def read(place: Path, block: int, min_rating: float | None) -> tuple[Any, ...]:
    """The log, what was read of it and what was said, with blocks of so many bytes; or the error."""
    file = LineFile(place, "interactions", 0.6)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        patch.setattr(line_files, "BLOCK", block)
        try:
            log, facts, about = interactions(
                file, file.fields({name: at for at, name in enumerate(NAMES)}, len(NAMES), "|"), min_rating
            )
        except UserError as error:
            return str(error), file.rejected
    frame = log.frame()
    assert LINE not in frame.columns
    assert log.counts() == {"rows": frame.height, "users": frame["user_id"].n_unique(),
                            "items": frame["item_id"].n_unique()}  # fmt: skip
    return frame.rows(named=True), facts, about, file.rejected, [str(warning.message) for warning in said]


@given(st.data())
def test_the_size_of_a_block_changes_nothing(place: Path, data: st.DataObject) -> None:
    times = st.sampled_from(data.draw(st.sampled_from(TIMES)))
    ids = st.sampled_from(["a", "b", "7.0", "é", "nan", ""])
    rows = st.tuples(
        ids, ids, st.sampled_from(["1", "4.5", "", "x", "inf"]), times, st.sampled_from(["", "so <b>so</b>"])
    )
    text = "\n".join("|".join(row) for row in data.draw(st.lists(rows, min_size=1, max_size=30)))
    place.write_text(text + "\nno line\n", encoding="utf-8")
    min_rating = data.draw(st.sampled_from([None, 4.0]))
    assert read(place, data.draw(st.integers(8, 60)), min_rating) == read(place, 1 << 24, min_rating)


def test_one_time_that_is_none_puts_all_of_them_to_the_test(place: Path) -> None:
    lines = [("a", "x", "", "1950-01-01", ""), ("a", "y", "", "2020-01-01", ""), ("a", "z", "", "never", "")]
    for some, kept in ((lines[:2], ["x", "y"]), (lines, ["y"])):
        place.write_text("".join("|".join(line) + "\n" for line in some))
        file = LineFile(place, "interactions", 1)
        fields = file.fields({name: at for at, name in enumerate(NAMES)}, len(NAMES), "|")
        assert interactions(file, fields)[0].frame()["item_id"].to_list() == kept
    assert file.first_bad == (1, "timestamp: no time between 1973 and 2103")


def test_a_log_is_read_with_a_block_in_memory(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    n, held = 2000, []
    place.write_text(
        "".join(json.dumps({"u": f"u{at % 50}", "i": f"i{at % 7}", "t": 1.6e9 + at}) + "\n" for at in range(n))
    )
    monkeypatch.setattr(line_files, "BLOCK", 1000)
    file = LineFile(place, "interactions", 0)
    schema = {"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Float64}
    blocks = file.records(lambda record: (record["u"], record["i"], record["t"]), schema)
    log, _, _ = interactions(file, (held.append(block.height) or block for block in blocks))
    assert (log.frames.height, sum(held)) == (n, n)
    assert max(held) < 50, "about the lines of 1000 bytes"
    assert max(frame.height for frame in log.frames) < 50
