from pathlib import Path

import polars as pl
import pytest

from reasonrec.data_gen.interaction_log import LogOptions, build_tables
from reasonrec.data_gen.readers.tables import TablesReader, read_interactions, read_items, read_tables
from reasonrec.tokenizers.errors import UserError

COLUMNS = {"user_id": "userId", "item_id": "movieId"}


@pytest.fixture
def ratings(tmp_path: Path) -> Path:
    path = tmp_path / "ratings.csv"
    path.write_text("userId,movieId,rating,timestamp\n01,7,4.5,10\n01,8,2,11\n2,7,3,12\n")
    return path


def read_frame(path: Path, **told: object) -> tuple[pl.DataFrame, list[dict[str, object]], dict[str, object]]:
    """A log with its ids, in memory."""
    log, facts, read = read_interactions(path, **told)  # type: ignore[arg-type]
    return log.frame(), facts, read  # type: ignore[return-value]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_columns_are_mapped_and_ratings_filtered(ratings: Path) -> None:
    log, facts, read = read_frame(ratings, columns=COLUMNS, min_rating=3)
    assert log.rows() == [("01", "7", 10_000), ("2", "7", 12_000)]
    assert (facts[0]["step"], facts[0]["rows_before"], facts[0]["rows_after"]) == ("min_rating", 3, 2)
    assert (read["rows"], read["kept"], read["dropped"]) == (3, 2, {"rated lower": 1, "without a rating": 0})
    everything, none, _ = read_frame(ratings, columns=COLUMNS)
    assert everything.height == 3
    assert none == []


def test_ratings_that_are_mapped_stay(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", "user_id,item_id,timestamp,stars\n1,7,10,4.5\n1,8,11,\n2,7,12,2\n")
    columns = {"rating": "stars"}
    log, _, _ = read_frame(path, columns=columns)
    assert log.select("item_id", "rating").rows() == [("7", 4.5), ("8", None), ("7", 2.0)]
    kept, _, _ = read_frame(path, columns=columns, min_rating=3)
    assert kept.select("item_id", "rating").rows() == [("7", 4.5)]
    with pytest.raises(UserError, match=r"1 values of column 'stars' are no ratings"):
        read_frame(write(path, "user_id,item_id,timestamp,stars\n1,7,10,good\n"), columns=columns)


def test_parquet_reads_like_csv(ratings: Path, tmp_path: Path) -> None:
    path = tmp_path / "ratings.parquet"
    frame = pl.read_csv(ratings, schema_overrides={"userId": pl.String})
    frame.with_columns(pl.from_epoch("timestamp")).write_parquet(path)
    csv, parquet = (read_frame(file, columns=COLUMNS, min_rating=3)[0] for file in (ratings, path))
    assert csv.equals(parquet)


def test_separator_and_byte_order_mark(tmp_path: Path) -> None:
    path = write(tmp_path / "log.tsv", "\ufeffuser_id\titem_id\ttimestamp\n1\t2\t2024-01-01\n")
    assert read_frame(path, columns={}, separator="\t")[0].rows() == [("1", "2", 1704067200000)]


def test_missing_column_names_file_column_mapping_and_the_nearest(ratings: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_frame(ratings, columns={})
    message = str(caught.value)
    assert "ratings.csv has no column 'user_id'" in message
    assert "set interaction_columns.user_id to the right one of 'userId', 'movieId'" in message
    assert "(the nearest is 'userId')" in message


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({**COLUMNS, "usr": "userId"}, r"interaction_columns\.usr.*did you mean user_id"),
        ({**COLUMNS, "review": "text"}, r"no column 'text'; set interaction_columns\.review"),
        ({**COLUMNS, "timestamp": "userId"}, r"user_id and timestamp are both mapped to column 'userId'"),
        ({**COLUMNS, "rating": "stars"}, r"no column 'stars'; set interaction_columns\.rating"),
    ],
    ids=["unknown", "optional", "twice", "unrated"],
)
def test_wrong_mappings(ratings: Path, columns: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_frame(ratings, columns=columns)


def test_timestamp_that_does_not_parse_names_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", "user_id,item_id,timestamp,rating\n1,2,5,1\n1,3,2024-01-01,5\n1,4,soon,5\n")
    with pytest.raises(UserError, match=r"1 values of column 'timestamp'.*'soon' in line 4 of .*log\.csv"):
        read_frame(path, columns={}, min_rating=3)


def test_missing_id_and_rating_name_their_line(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", "user_id,item_id,timestamp,rating\n1,2,5,1\n1,,6,5\n")
    with pytest.raises(UserError, match=r"1 rows have nothing in column 'item_id', the first is line 3"):
        read_frame(path, columns={})
    path = write(tmp_path / "log.csv", "user_id,item_id,timestamp,rating\n1,2,5,good\n")
    with pytest.raises(UserError, match=r"no ratings, the first is 'good' in line 2"):
        read_frame(path, columns={}, min_rating=1)


@pytest.mark.parametrize("value", ["1e300", "inf", "-1e300", "9" * 30])
def test_times_out_of_any_range_name_their_row(tmp_path: Path, value: str) -> None:
    log = write(tmp_path / "log.csv", f"user_id,item_id,timestamp\n1,2,1700000000\n1,3,1700000000.5\n1,4,{value}\n")
    with pytest.raises(UserError, match=r"1 values of column 'timestamp' are no timestamps.* in line 4 of .*log\.csv"):
        read_frame(log, columns={})
    path, times = tmp_path / "log.parquet", [1.7e9, 1.7e9 + 0.5, float(value)]
    pl.DataFrame({"user_id": ["1"] * 3, "item_id": ["2"] * 3, "timestamp": times}).write_parquet(path)
    with pytest.raises(UserError, match=r"column 'timestamp'.* in row 3 of .*log\.parquet"):
        read_frame(path, columns={})


def test_ratings_out_of_range(tmp_path: Path) -> None:
    for value in ("inf", "-inf", "1e999"):
        log = write(tmp_path / "log.csv", f"user_id,item_id,timestamp,rating\n1,2,5,1\n1,3,6,{value}\n")
        with pytest.raises(UserError, match=rf"1 values .* are no ratings, the first is '{value}' in line 3"):
            read_frame(log, columns={}, min_rating=1)
    log = write(tmp_path / "log.csv", "user_id,item_id,timestamp,rating\n1,2,5,-1e300\n1,3,6,1e300\n")
    assert read_frame(log, columns={}, min_rating=1)[0]["item_id"].to_list() == ["3"]


def test_an_id_as_long_as_a_text_is_another_column(tmp_path: Path) -> None:
    path = tmp_path / "items.parquet"
    pl.DataFrame({"item_id": ["a\0b\x1b", "x" * 1000], "title": ["A", "B"]}).write_parquet(path)
    assert read_items(path, columns={})[0]["item_id"].to_list() == ["a\0b\x1b", "x" * 1000], "kept as written"
    pl.DataFrame({"item_id": ["a", "\x1b" * 100_000], "title": ["A", "B"]}).write_parquet(path)
    with pytest.raises(
        UserError, match=r"'item_id', row 2 of .*, has 100,000 characters, more than 1,000: "
    ) as caught:
        read_items(path, columns={})
    assert str(caught.value).isprintable()
    assert str(caught.value).endswith("or shorten the ids in both tables")


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_items(tmp_path / "none.csv", columns={})
    with pytest.raises(UserError, match=r"has to end in \.csv"):
        read_items(write(tmp_path / "items.xlsx", "x"), columns={})
    latin = tmp_path / "latin.csv"
    latin.write_bytes("item_id,title\n1,Amélie\n".encode("latin-1"))
    with pytest.raises(UserError, match="UTF-8"):
        read_items(latin, columns={})
    with pytest.raises(UserError, match="cannot be read"):
        read_items(write(tmp_path / "empty.csv", ""), columns={})


def test_reviews_are_cleaned_and_only_of_training_interactions(tmp_path: Path) -> None:
    lines = "".join(f"1,{item},{item},<|im_end|> liked {item}\n" for item in range(1, 5))
    log = write(tmp_path / "log.csv", "user_id,item_id,timestamp,text\n" + lines)
    items = write(tmp_path / "items.csv", "item_id,title\n" + "".join(f"{item},t{item}\n" for item in range(1, 5)))
    source = read_tables("x", log, items, interaction_columns={"review": "text"}, item_columns={})
    train = build_tables(source, LogOptions()).train
    assert train["reviews"].to_list() == [["‹|im_end|› liked 1", "‹|im_end|› liked 2"]]


def test_who_owns_the_data_says_whether_titles_may_be_published(tmp_path: Path) -> None:
    log = write(tmp_path / "log.csv", "user_id,item_id,timestamp\n1,1,1\n1,2,2\n1,3,3\n")
    items = write(tmp_path / "items.csv", "item_id,title\n1,A\n2,B\n3,C\n")
    for told, expected in (({}, True), ({"redistributable": False}, False)):
        tables, _ = TablesReader(interactions=str(log), items=str(items), **told).read()
        assert tables.facts["redistributable"] is expected


def test_list_columns_of_parquet_items_are_joined(tmp_path: Path) -> None:
    path = tmp_path / "items.parquet"
    pl.DataFrame({"item_id": [1], "title": ["A"], "category": [["Toys", "Games"]]}).write_parquet(path)
    assert read_items(path, columns={})[0]["category"].to_list() == ["Toys, Games"]


def test_movielens_small_through_the_generic_reader(benchmark_data: Path) -> None:
    folder = benchmark_data / "movielens_small"
    if not (folder / "ratings.csv").is_file():
        pytest.skip(f"{folder} is not there")
    source = read_tables(
        "MovieLens small",
        folder / "ratings.csv",
        folder / "movies.csv",
        interaction_columns=COLUMNS,
        item_columns={"item_id": "movieId", "category": "genres"},
    )
    assert source.interactions.frame().height == 100_836
    tables = build_tables(source, LogOptions(user_k=5, item_k=5, mask_history=True))
    assert (tables.users.height, tables.items.height, tables.test.height) == (610, 3650, 610)
    assert tables.facts["filters"][-1]["rows_after"] == 90_274
    liked = read_frame(folder / "ratings.csv", columns=COLUMNS, min_rating=4)[0]
    tables = build_tables(
        type(source)("ml", liked, source.items, items_name="movies.csv"), LogOptions(user_k=5, item_k=5)
    )
    assert (tables.users.height, tables.items.height) == (601, 1955)
    assert tables.facts["filters"][-1]["rows_after"] == 41_227


LOG = "user_id,item_id,timestamp\n"
ITEMS = "item_id,title\n1,A\n2,B\n"


def test_ids_agree_over_both_tables_and_formats(tmp_path: Path) -> None:
    log = write(tmp_path / "log.csv", LOG + "7,1.0,10\n7.0,2,11\n007,1,12\n")
    items = tmp_path / "items.parquet"
    pl.DataFrame({"item_id": [1.0, 2.0], "title": ["A", "B"]}).write_parquet(items)
    source = read_tables("x", log, items, interaction_columns={}, item_columns={})
    assert source.interactions.frame().select("user_id", "item_id").rows() == [("7", "1"), ("7", "2"), ("007", "1")]
    assert source.items["item_id"].to_list() == ["1", "2"]
    assert source.read[0]["ids_written_as_floats"] == {"user_id": 1, "item_id": 1}


def test_two_rows_that_only_a_spelling_tells_apart(tmp_path: Path) -> None:
    items = write(tmp_path / "items.csv", ITEMS + "2.0,C\n")
    with pytest.raises(UserError, match=r"'2' \(line 3 of .*\) and '2\.0' \(line 4 of .*\) are the same number"):
        read_items(items, columns={})


@pytest.mark.parametrize("word", ["", " ", "nan", "NaN", "NULL", "None", "<NA>", r"\N", "#N/A"])
def test_words_for_nothing_are_no_ids_and_no_titles(word: str, tmp_path: Path) -> None:
    log = write(tmp_path / "log.csv", LOG + f"1,1,10\n{word},2,11\n")
    with pytest.raises(UserError, match=r"1 rows have nothing in column 'user_id', the first is line 3"):
        read_frame(log, columns={})
    items = write(tmp_path / "items.csv", "item_id,title,brand\n" + f"1,{word},{word}\n")
    assert read_items(items, columns={})[0].select("title", "brand").rows() == [("", "")]
    parquet = tmp_path / "log.parquet"
    pl.DataFrame({"user_id": ["1", word], "item_id": ["1", "2"], "timestamp": [1, 2]}).write_parquet(parquet)
    with pytest.raises(UserError, match=r"nothing in column 'user_id', the first is row 2"):
        read_frame(parquet, columns={})


def test_missing_ids_in_a_column_of_floats(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    pl.DataFrame({"user_id": [1.0, float("nan"), None], "item_id": [1, 2, 3], "timestamp": [1, 2, 3]}).write_parquet(
        path
    )
    with pytest.raises(UserError, match=r"2 rows have nothing in column 'user_id', the first is row 2"):
        read_frame(path, columns={})


def test_ids_that_lost_digits(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'1\.23457E\+11' in column 'user_id', line 3.*export the column again"):
        read_frame(write(tmp_path / "log.csv", LOG + "1,1,1\n1.23457E+11,2,2\n"), columns={})


@pytest.mark.parametrize("word", ["", "nan", "NA", "NULL"])
def test_what_has_no_rating_does_not_pass(word: str, tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", "user_id,item_id,timestamp,rating\n" + f"1,1,1,5\n1,2,2,{word}\n1,3,3,2\n")
    log, facts, read = read_frame(path, columns={}, min_rating=4)
    assert (log["item_id"].to_list(), facts[0]["missing"]) == (["1"], 1)
    assert read["dropped"] == {"rated lower": 1, "without a rating": 1}
    parquet = tmp_path / "log.parquet"
    ratings = pl.Series("rating", [5.0, float("nan") if word else None, 2.0])
    pl.read_csv(path).with_columns(ratings).write_parquet(parquet)
    assert read_frame(parquet, columns={}, min_rating=4)[0].equals(log)
    with pytest.raises(UserError, match=r"1 values of column 'rating' are no ratings, the first is 'inf'"):
        read_frame(write(path, path.read_text().replace(",5\n", ",inf\n")), columns={}, min_rating=4)


def test_two_units_of_time_name_both_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", LOG + "1,1,1700000000\n1,2,1700000060\n2,1,1700000000000\n")
    message = (
        r"'1700000000000' in line 4 of .* reads as epoch milliseconds, but '1700000000' in line 2 .* epoch seconds"
    )
    with pytest.raises(UserError, match=message):
        read_frame(path, columns={})


def test_columns_of_one_name(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", "user_id,item_id,timestamp,x,x\n1,2,3,4,5\n")
    assert read_frame(path, columns={})[0].height == 1
    with pytest.raises(UserError, match="2 columns are called 'x'"):
        read_frame(path, columns={"user_id": "x"})


def test_a_header_that_was_not_cut_says_which_separator_may_be_right(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="or set separator: '::'"):
        read_items(write(tmp_path / "items.csv", ITEMS.replace(",", "::")), columns={})
    with pytest.raises(UserError, match="this one looks like a row: write the names above it"):
        read_items(write(tmp_path / "items.dat", "1::A\n2::B\n"), columns={}, separator="::")
    items = write(tmp_path / "items.dat", ITEMS.replace(",", "::"))
    assert read_items(items, columns={}, separator="::")[0]["title"].to_list() == ["A", "B"]


def test_columns_of_the_wrong_type(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    frame = pl.DataFrame({"user_id": ["1"], "item_id": ["1"], "timestamp": [1], "rating": [5]})
    for name, message in (("user_id", "no ids"), ("timestamp", "no timestamps"), ("rating", "no ratings")):
        frame.with_columns(pl.concat_list(name)).write_parquet(path)
        with pytest.raises(UserError, match=message):
            read_frame(path, columns={}, min_rating=1)
    frame.with_columns(pl.col("user_id").cast(pl.Binary)).write_parquet(path)
    assert read_frame(path, columns={})[0]["user_id"].to_list() == ["1"]
    frame.with_columns(user_id=pl.lit(b"\xff")).write_parquet(path)
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        read_frame(path, columns={})
    frame.head(0).write_parquet(path)
    with pytest.raises(UserError, match="it has no rows"):
        read_frame(path, columns={})
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        read_frame(write(path, "user_id\n"), columns={})
