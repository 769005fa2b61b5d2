"""A log that is worked on in buckets of users becomes what a naive reading of the same rows becomes, bit by bit."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reasonrec.data_gen import coded_log, interaction_log, schema
from reasonrec.data_gen.clean import clean_items
from reasonrec.data_gen.coded_log import CodedLog, Ids, buckets_of
from reasonrec.data_gen.frames import Frames
from reasonrec.data_gen.interaction_log import InteractionLog, LogOptions, build_tables
from reasonrec.data_gen.readers import csv_reader, table_files
from reasonrec.data_gen.readers.tables import TablesReader
from reasonrec.data_gen.schema import pieces, write_dataset
from reasonrec.data_gen.seeded_hash import seeded_hash
from reasonrec.data_gen.splits import date_cuts, ratio_cuts
from reasonrec.tokenizers.errors import UserError

Row = tuple[str, str, int, float | None]
USERS, ITEMS = ["2", "10", "9", "b", "a "], ["7", "11", "x", "007", "ü", "no title"]
ROWS = st.lists(
    st.tuples(
        st.sampled_from(USERS),
        st.sampled_from(ITEMS[:-1]) | st.just(ITEMS[-1]),
        st.integers(0, 6).map(lambda day: day * 86_400_000),
        st.sampled_from([1.0, 4.5, None]),
    ),
    max_size=40,
)


def naive(rows: list[Row], ordered: bool, options: LogOptions) -> dict[str, list[Any]] | str:
    """The tables, by loops over a list; "few" where nothing is left."""
    hashes = [0] * len(rows)
    if rows and not ordered:
        columns = [pl.Series([row[n] for row in rows]) for n in (0, 2, 1)]
        hashes = seeded_hash(options.seed, *columns).tolist()
    keys = [
        (u, t, h, "" if ordered else i, -1 if ordered or r is None else r)
        for (u, i, t, r), h in zip(rows, hashes, strict=True)
    ]
    log = [rows[n] for n in sorted(range(len(rows)), key=lambda n: keys[n])]
    log = [row for row in log if row[1] != "no title"]
    if options.duplicates == "keep_first":
        log = [row for n, row in enumerate(log) if row[:2] not in {other[:2] for other in log[:n]}]

    def once(log: list[Row]) -> list[Row]:
        if options.duplicates != "drop_consecutive":
            return log
        return [row for n, row in enumerate(log) if not n or log[n - 1][:2] != row[:2]]

    log = once(log)
    while True:
        users, items = Counter(row[0] for row in log), Counter(row[1] for row in log)
        kept = [row for row in log if users[row[0]] >= options.user_k and items[row[1]] >= options.item_k]
        if kept == log and (kept := once(log)) == log:
            break
        log = kept
    number = {}
    for n in (0, 1):
        ids = {row[n] for row in log}
        whole = all(word.isascii() and word.isdigit() for word in ids)
        number[n] = {word: at for at, word in enumerate(sorted(ids, key=(lambda w: (int(w), w)) if whole else str))}
    log.sort(key=lambda row: number[0][row[0]])
    cuts = (0, 0)
    if options.split == "time" and log:
        times = np.array([row[2] for row in log])
        if options.valid_from and options.test_from:
            cuts = date_cuts(options.valid_from, options.test_from)
        elif len(set(times.tolist())) < 3:
            return "few"
        else:
            cuts = ratio_cuts(times, options.split_ratios or (0.8, 0.1, 0.1))
    tables: dict[str, list[Any]] = {"train": [], "valid": [], "test": []}
    for user, at in number[0].items():
        own = [(number[1][i], t, r) for u, i, t, r in log if u == user]
        for n, (item, time, _) in enumerate(own):
            part = sum(time >= cut for cut in cuts)
            if options.split == "leave_one_out":
                part = max(0, n - len(own) + 3) if len(own) >= 3 else 0
            if part and n:
                past = [found[0] for found in own[:n]]
                masked = sorted(set(past)) if options.mask_history else []
                table = tables["valid" if part == 1 else "test"]
                same = own[n - 1][1] == time
                table.append((len(table), at, past[-(options.max_history or n) :], item, masked, same))
            if not part:
                if not tables["train"] or tables["train"][-1][0] != at:
                    tables["train"].append((at, [], 0, [], []))
                for column, value in zip((1, 3, 4), own[n], strict=True):
                    tables["train"][-1][column].append(value)
    if not tables["train"] or not tables["test"]:
        return "few"
    return tables | {"users": list(number[0]), "items": list(number[1])}


def options_of(draw: Any) -> LogOptions:
    split = draw(st.sampled_from(["leave_one_out", "ratios", "dates"]))
    duplicates = draw(st.sampled_from(["keep", "drop_consecutive", "keep_first"]))
    timed = {
        "leave_one_out": {},
        "ratios": {"split": "time", "split_ratios": [0.5, 0.25, 0.25]},
        "dates": {"split": "time", "valid_from": "1970-01-04", "test_from": "1970-01-06"},
    }[split]
    return LogOptions(
        seed=draw(st.integers(0, 3)),
        user_k=draw(st.integers(1, 3)),
        item_k=draw(st.integers(1, 3)),
        duplicates=duplicates,
        drop_items_without_text=True,
        mask_history=duplicates == "keep_first" and draw(st.booleans()),
        max_history=draw(st.none() | st.integers(1, 3)),
        **timed,  # type: ignore[arg-type]
    )


def source(rows: list[Row], ordered: bool) -> InteractionLog:
    schema = {"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Int64, "rating": pl.Float64}
    items = pl.DataFrame({"item_id": ITEMS, "title": ["" if item == "no title" else f"item {item}" for item in ITEMS]})
    log = pl.DataFrame(rows, schema=schema, orient="row")
    return InteractionLog("test", log, clean_items(items, 100), items_name="items.csv", ordered=ordered)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), ROWS, st.booleans(), st.sampled_from([1, 5, 1000]))
def test_buckets_give_what_a_naive_reading_gives(
    monkeypatch: pytest.MonkeyPatch, data: st.DataObject, rows: list[Row], ordered: bool, bucket: int
) -> None:
    options = options_of(data.draw)
    monkeypatch.setattr(coded_log, "BUCKET", bucket)
    monkeypatch.setattr(interaction_log, "IN_MEMORY", data.draw(st.sampled_from([0, 1000])))
    expected = naive(rows, ordered, options)
    try:
        tables = build_tables(source(rows, ordered), options)
    except UserError:
        assert expected == "few"
        return
    assert isinstance(expected, dict)
    frames = {name: pl.concat(list(pieces(getattr(tables, name)))) for name in ("train", "valid", "test")}
    assert {name: frame.rows() for name, frame in frames.items()} == {
        "train": [(user, items, first, times, ratings) for user, items, first, times, ratings in expected["train"]],
        "valid": expected["valid"],
        "test": expected["test"],
    }
    assert tables.users["user_id"].to_list() == expected["users"]
    assert tables.items["item_id"].to_list() == expected["items"]


@pytest.mark.parametrize("split", [{}, {"split": "time"}], ids=["leave one out", "time"])
@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_files_do_not_depend_on_how_much_is_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: dict[str, Any], ending: str
) -> None:
    draw = np.random.default_rng(0)
    n = 3000
    log = pl.DataFrame(
        {
            "user_id": pl.Series(draw.integers(0, 200, n)).cast(pl.String),
            "item_id": pl.Series(draw.zipf(1.3, n) % 80).cast(pl.String),
            "timestamp": 1_600_000_000 + draw.integers(0, 400, n),
            "rating": draw.integers(1, 6, n).astype(float),
            "text": [f"words {number} <b>" for number in range(n)],
        }
    )
    log.write_csv(tmp_path / "log.csv")
    log.write_parquet(tmp_path / "log.parquet")
    pl.DataFrame({"item_id": range(80), "title": [f"item {item}" for item in range(80)]}).write_csv(tmp_path / "i.csv")
    written = []
    for small in (False, True):
        if small:
            for module, name, value in (
                (coded_log, "BUCKET", 150),
                (interaction_log, "IN_MEMORY", 0),
                (csv_reader, "BLOCK", 5000),
                (table_files, "_ROWS", 170),
            ):
                monkeypatch.setattr(module, name, value)
        reader = TablesReader(
            interactions=str(tmp_path / f"log.{ending}"), items=str(tmp_path / "i.csv"), min_rating=2, user_k=3,
            item_k=4, mask_history=True, interaction_columns={"rating": "rating", "review": "text"}, **split,
        )  # fmt: skip
        tables, _ = reader.read()
        folder = tmp_path / str(small)
        folder.mkdir()
        facts = write_dataset(folder, tables)
        written.append((facts, {file.name: file.read_bytes() for file in sorted(folder.iterdir())}))
    assert written[0] == written[1]


def test_row_groups_of_a_table_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "ROW_GROUP", 8)
    frames = Frames()
    for start in range(0, 30, 3):
        frames.append(pl.DataFrame({"row": range(start, start + 3), "items": [[n] * n for n in range(3)]}))
    schema._write(frames, tmp_path / "t.parquet")
    assert pl.read_parquet(tmp_path / "t.parquet").equals(frames.frame())


@given(st.lists(st.integers(0, 7), max_size=12), st.integers(1, 9))
def test_parts_hold_all_rows_in_their_order(sizes: list[int], rows: int) -> None:
    frames, at = Frames(), 0
    for size in [0, *sizes]:
        frames.append(pl.DataFrame({"n": range(at, at + size)}, schema={"n": pl.Int64}))
        at += size
    parts = list(frames.parts(rows))
    assert [n for part in parts for n in part["n"]] == list(range(at))
    assert all(part.height == rows for part in parts[:-1])
    assert frames.height == at


def test_ids_come_back_and_users_stay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = Ids()
    assert [ids.encode(pl.Series(words)).to_list() for words in (["b", "a", "b"], ["ü", "a"], [])] == [
        [0, 1, 0],
        [2, 1],
        [],
    ]
    assert ids.words().to_list() == ["b", "a", "ü"]
    log = CodedLog.of(pl.DataFrame({"user_id": list("abcabcab"), "item_id": list("xyzxyzxy"), "timestamp": range(8)}))
    monkeypatch.setattr(coded_log, "BUCKET", 2)
    buckets = buckets_of([log.frames], np.array([2, 0, 1]), log.users.counts)
    assert [bucket.frame()["timestamp"].to_list() for bucket in buckets] == [[2, 5], [0, 3, 6], [1, 4, 7]]
    assert log.frame()["user_id"].to_list() == list("abcabcab")
