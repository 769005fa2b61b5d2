"""From a log to a dataset: nothing leaks, nothing depends on an order of the file that means nothing."""

import random
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonrec.data_gen.clean import clean_items
from reasonrec.data_gen.coded_log import CodedLog
from reasonrec.data_gen.interaction_log import InteractionLog, LogOptions, Ties, build_tables, sort_log
from reasonrec.data_gen.schema import Tables, write_dataset
from reasonrec.tokenizers.errors import UserError

Row = tuple[str, str, int]


def source(rows: list[Row], *, ordered: bool = False) -> InteractionLog:
    schema = {"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Int64}
    ids = sorted({item for _, item, _ in rows})
    items = pl.DataFrame({"item_id": ids, "title": [f"item {item}" for item in ids]})
    log = pl.DataFrame(rows, schema=schema, orient="row")
    return InteractionLog("test", log, clean_items(items, 100), items_name="items.csv", ordered=ordered)


def some_rows(seed: int, n_users: int = 30, n_items: int = 20, per_user: int = 8) -> list[Row]:
    """Each user with distinct items and a few shared timestamps."""
    draw = random.Random(seed)
    return [
        (str(user), str(item), draw.randrange(40))
        for user in range(n_users)
        for item in draw.sample(range(n_items), per_user)
    ]


def written(tables: Tables, folder: Path) -> dict[str, bytes]:
    folder.mkdir()
    write_dataset(folder, tables)
    return {file.stem: file.read_bytes() for file in sorted(folder.iterdir())}


OPTIONS = {
    "leave_one_out": LogOptions(mask_history=True),
    "time": LogOptions(split="time", split_ratios=(0.7, 0.15, 0.15), max_history=3),
}


@pytest.mark.parametrize("split", OPTIONS)
def test_poisoned_held_out_rows_change_nothing_that_trains(split: str, tmp_path: Path) -> None:
    rows = some_rows(1)
    options = OPTIONS[split]
    clean = build_tables(source(rows), options)
    held_out = {
        (str(user), str(item))
        for part in (clean.valid, clean.test)
        for user, item in part.join(clean.users, on="user")
        .join(clean.items, left_on="target", right_on="item")
        .select("user_id", "item_id")
        .iter_rows()
    }
    at = [n for n, (user, item, _) in enumerate(rows) if (user, item) in held_out]
    assert len(at) > 20
    # A user may not get an item twice (that would be filtered), so only fitting pairs are swapped.
    owned = {user: {item for u, item, _ in rows if u == user} for user, _, _ in rows}
    poisoned, moved = list(rows), 0
    draw = random.Random(2)
    for _ in range(500):
        a, b = draw.sample(at, 2)
        (user_a, item_a, time_a), (user_b, item_b, time_b) = poisoned[a], poisoned[b]
        alone = [sum(1 for u, _, t in rows if (u, t) == (user, time)) == 1 for user, _, time in (rows[a], rows[b])]
        if item_b in owned[user_a] or item_a in owned[user_b] or user_a == user_b or not all(alone):
            continue
        poisoned[a], poisoned[b] = (user_a, item_b, time_a), (user_b, item_a, time_b)
        owned[user_a] ^= {item_a, item_b}
        owned[user_b] ^= {item_a, item_b}
        moved += 1
    assert moved > 10
    before, after = (
        written(tables, tmp_path / name)
        for name, tables in (("clean", clean), ("poisoned", build_tables(source(poisoned), options)))
    )
    assert before["train"] == after["train"]
    assert before["items"] == after["items"]
    assert before["users"] == after["users"]
    assert before["test"] != after["test"]


@pytest.mark.parametrize("split", OPTIONS)
def test_same_seed_same_bytes_whatever_the_order_of_the_file(split: str, tmp_path: Path) -> None:
    rows = some_rows(3)
    first = written(build_tables(source(rows), OPTIONS[split]), tmp_path / "a")
    random.Random(0).shuffle(rows)
    assert written(build_tables(source(rows), OPTIONS[split]), tmp_path / "b") == first


def test_another_seed_orders_a_timestamp_otherwise() -> None:
    log = CodedLog.of(source([("u", str(item), 7) for item in range(20)]).interactions)
    orders = {tuple(sort_log(log.frames.frame(), Ties.of(log, seed))["item"].to_list()) for seed in range(5)}
    assert len(orders) == 5
    assert tuple(range(20)) not in orders


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("abcd"), st.sampled_from("vwxyz"), st.integers(0, 4)),
        min_size=1,
        max_size=40,
    ),
    st.sampled_from(["keep", "drop_consecutive", "keep_first"]),
    st.randoms(use_true_random=False),
)
def test_row_order_never_matters(rows: list[Row], duplicates: str, draw: random.Random) -> None:
    options = LogOptions(duplicates=duplicates, seed=5)  # type: ignore[arg-type]

    def build(rows: list[Row]) -> list[pl.DataFrame] | str:
        try:
            tables = build_tables(source(rows), options)
        except UserError as error:  # too little to split is an answer, too
            return str(error)
        return [tables.train, tables.valid, tables.test, tables.users, tables.items]

    shuffled = draw.sample(rows, len(rows))
    one, other = build(rows), build(shuffled)
    if isinstance(one, str) or isinstance(other, str):
        assert one == other
        return
    assert all(a.equals(b) for a, b in zip(one, other, strict=True))
    n_targets = one[0]["items"].list.len().sum() + one[1].height + one[2].height
    assert duplicates != "keep" or n_targets == len(rows)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        # Far apart as well: user and time then do not fit into one number.
        st.tuples(st.sampled_from("abc"), st.sampled_from("vwxyz"), st.sampled_from([0, 1, 2, -7, 2**62, -(2**62)])),
        max_size=30,
    )
)
def test_a_file_that_has_an_order_keeps_it(rows: list[Row]) -> None:
    log = CodedLog.of(source(rows, ordered=True).interactions.with_row_index("at"))
    by_hand = sorted(range(len(rows)), key=lambda at: (rows[at][0], rows[at][2], at))
    users = {user: log.users.encode(pl.Series([user]))[0] for user, _, _ in rows}
    by_hand.sort(key=lambda at: users[rows[at][0]])
    assert sort_log(log.frames.frame(), None)["at"].to_list() == by_hand


def test_interactions_that_share_a_time_are_counted() -> None:
    rows = [("1", "a", 5), ("1", "b", 5), ("1", "c", 6), ("1", "d", 7), ("2", "a", 7), ("2", "b", 8), ("2", "c", 8)]
    ordered = build_tables(source(rows, ordered=True), LogOptions())
    assert ordered.facts["ties"] == {"interactions": 4, "of": 7, "order": "they stand as in the file"}
    assert ordered.test.join(ordered.items, left_on="target", right_on="item", maintain_order="left")[
        "item_id"
    ].to_list() == ["d", "c"]
    hashed = build_tables(source(rows), LogOptions(seed=3))
    assert hashed.facts["ties"]["order"] == "a hash of seed 3 orders them"


def test_facts_and_numbers_by_hand() -> None:
    rows = [
        *[("10", item, n) for n, item in enumerate(["2", "10", "9"])],
        ("9", "10", 0),
        ("9", "2", 1),
        ("9", "7", 9),
    ]
    tables = build_tables(source([*rows, ("9", "9", 8)]), LogOptions(item_k=2, mask_history=True))
    assert tables.facts["notes"][-1] == "other users' futures visible"
    steps = {fact["step"]: (fact["rows_before"], fact["rows_after"]) for fact in tables.facts["filters"]}
    assert steps == {"items_without_text": (7, 7), "duplicates": (7, 7), "k_core": (7, 6)}
    # Whole numbers are ordered by value: 2, 9, 10.
    assert tables.items["item_id"].to_list() == ["2", "9", "10"]
    assert tables.users["user_id"].to_list() == ["9", "10"]
    assert tables.train.select("user", "items").rows() == [(0, [2]), (1, [0])]
    assert tables.test.select("history", "target", "masked").rows() == [
        ([2, 0], 1, [0, 2]),
        ([0, 2], 1, [0, 2]),
    ]


def test_too_few_for_the_split() -> None:
    with pytest.raises(UserError, match=r"leaves 3 train, 0 validation and 0 test .*lower item_k"):
        build_tables(source([("1", "a", 0), ("1", "b", 1), ("2", "a", 0)]), LogOptions())


def test_empty_after_the_core_says_what_each_filter_removed() -> None:
    rows = [*[("1", item, n) for n, item in enumerate("abab")], ("2", "c", 0)]
    with pytest.raises(UserError, match=r"duplicates removed 2 of 5 .*k_core removed 3 of 3 .*item_k=2"):
        build_tables(source(rows), LogOptions(item_k=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_history": True, "duplicates": "keep"}, "would be a target that is masked"),
        ({"valid_from": "2020-01-01", "split": "time"}, "belong together"),
        ({"split_ratios": (0.8, 0.1, 0.1)}, "are for split: time"),
        ({"split": "time", "split_ratios": (1,), "valid_from": "2020", "test_from": "2021"}, "not both"),
        ({"split": "time", "split_ratios": (1, 1, 1)}, "three positive shares"),
    ],
    ids=["mask", "one date", "ratios", "both", "sum"],
)  # fmt: skip
def test_contradictory_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LogOptions(**options)  # type: ignore[arg-type]
