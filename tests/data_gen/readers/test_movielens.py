from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from reasonrec.data_gen.interaction_log import LogOptions, build_tables
from reasonrec.data_gen.readers.movielens import MovieLensFolder, movie_title, read_movielens_100k
from reasonrec.tokenizers.errors import UserError


@pytest.mark.parametrize(
    ("title", "year", "expected"),
    [
        ("Toy Story", "1995", "Toy Story (1995)"),
        ("Toy Story (1995)", None, "Toy Story (1995)"),
        ("Cable Guy, The", "1996", "The Cable Guy (1996)"),
        ("Further Gesture, A (1996)", None, "A Further Gesture (1996)"),
        ("Paris, Texas", "1984", "Paris, Texas (1984)"),
        ("unkonwn", "unkonwn", "unkonwn"),
        ("Land Before Time III (1995)", "V", "Land Before Time III (1995)"),
    ],
)
def test_movie_title(title: str, year: str | None, expected: str) -> None:
    assert movie_title(title, year) == expected


def test_both_layouts_give_the_same(tmp_path: Path) -> None:
    grouplens, atomic = tmp_path / "ml-100k", tmp_path / "atomic"
    grouplens.mkdir()
    atomic.mkdir()
    (grouplens / "u.data").write_text("1\t2\t3\t881250949\n2\t1\t5\t881250950\n")
    flags = {1: "0|0|0|1|1|1" + "|0" * 13, 2: "0|1" + "|0" * 17}
    (grouplens / "u.item").write_bytes(
        f"1|Toy Story (1995)|01-Jan-1995||http://x|{flags[1]}\n2|Rosé, La (1996)|||x|{flags[2]}\n".encode("latin-1")
    )
    (atomic / "ml-100k.inter").write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\t2\t3\t881250949\n2\t1\t5\t881250950\n"
    )
    (atomic / "ml-100k.item").write_text(
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        "1\tToy Story\t1995\tAnimation Children's Comedy\n2\tRosé, La\t1996\tAction\n",
        encoding="utf-8",
    )
    first, second = (read_movielens_100k(str(folder)) for folder in (grouplens, atomic))
    columns = ["user_id", "item_id", "timestamp", "rating"]
    rows = [("1", "2", 881250949000, 3.0), ("2", "1", 881250950000, 5.0)]
    assert first.interactions.select(columns).rows() == second.interactions.select(columns).rows() == rows
    assert first.items.rows() == second.items.rows()
    assert first.items["category"].to_list() == ["Animation, Children's, Comedy", "Action"]


def test_titles_are_not_ours_to_publish(tmp_path: Path) -> None:
    (tmp_path / "u.data").write_text("1\t1\t3\t881250949\n1\t2\t3\t881250950\n1\t3\t3\t881250951\n")
    (tmp_path / "u.item").write_text("".join(f"{i}|Toy Story (1995)|||x|{'|0' * 19}\n" for i in (1, 2, 3)))
    facts = build_tables(read_movielens_100k(str(tmp_path)), LogOptions()).facts
    assert facts["redistributable"] is False
    assert "no redistribution" in facts["terms"]


def test_a_folder_without_the_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds neither u\.data and u\.item"):
        read_movielens_100k(str(tmp_path))


def test_counts_of_the_demo() -> None:
    if find_spec("recbole") is None:
        pytest.skip("the package recbole is not installed")
    tables = build_tables(read_movielens_100k(None), LogOptions(item_k=5, mask_history=True))
    assert (tables.users.height, tables.items.height) == (943, 1349)
    assert (tables.valid.height, tables.test.height) == (943, 943)
    assert tables.items["title"][0] == "Toy Story (1995)"
    assert tables.items["category"][0] == "Animation, Children's, Comedy"
    # Nothing is seen twice, and everything seen is masked.
    assert (tables.test["history"].list.len() == tables.test["masked"].list.len()).all()


RATINGS = [(1, 1, 4.5, 964982703), (1, 2, 2.0, 964982703), (1, 3, 4.0, 964981247), (2, 2, 5.0, 964981248)]
MOVIES = [
    (1, "Rosé, La (1996)", "Comedy|Drama"),
    (2, "Cable Guy, The (1996)", "(no genres listed)"),
    (3, "Heat (1995)", "Crime"),
]


def csv_folder(folder: Path) -> None:
    rows = "".join(f"{u},{i},{r},{t}\r\n" for u, i, r, t in RATINGS)
    (folder / "ratings.csv").write_text(f"userId,movieId,rating,timestamp\r\n{rows}", newline="")
    movies = "".join(f'{i},"{t}",{g}\n' for i, t, g in MOVIES)
    (folder / "movies.csv").write_text(f"movieId,title,genres\n{movies}", encoding="utf-8")


def dat_folder(folder: Path, encoding: str) -> None:
    (folder / "ratings.dat").write_text("".join(f"{u}::{i}::{r}::{t}\n" for u, i, r, t in RATINGS))
    movies = "".join(f"{i}::{t}::{g}\n" for i, t, g in MOVIES)
    (folder / "movies.dat").write_text(movies, encoding=encoding)


def hundred_thousand_folder(folder: Path) -> None:
    (folder / "u.data").write_text("".join(f"{u}\t{i}\t{r}\t{t}\n" for u, i, r, t in RATINGS))
    flags = {1: (5, 8), 2: (), 3: (6,)}
    lines = [f"{i}|{t}|||x|" + "|".join(str(int(k in flags[i])) for k in range(19)) for i, t, _ in MOVIES]
    (folder / "u.item").write_bytes("\n".join(lines).encode("latin-1"))


@pytest.mark.parametrize(
    "write",
    [csv_folder, lambda f: dat_folder(f, "latin-1"), lambda f: dat_folder(f, "utf-8"), hundred_thousand_folder],
    ids=["csv", "1M", "10M", "100K"],
)
def test_every_folder_gives_the_same(write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path)
    log = MovieLensFolder(path=str(tmp_path)).read_log()
    rows = log.interactions.frame().select("user_id", "item_id", "rating", "timestamp").rows()
    assert rows == [(str(u), str(i), r, t * 1000) for u, i, r, t in RATINGS]
    assert log.items["title"].to_list() == ["Rosé, La (1996)", "The Cable Guy (1996)", "Heat (1995)"]
    assert log.items["category"].to_list() == ["Comedy, Drama", "", "Crime"]
    assert not log.ordered
    assert not log.redistributable
    liked = MovieLensFolder(path=str(tmp_path), min_rating=4).read_log()
    assert liked.interactions.frame()["item_id"].to_list() == ["1", "3", "2"]
    assert liked.read[0]["rows"] == 4
    assert liked.read[0]["dropped"]["rated lower"] == 1


def test_broken_lines_are_counted_and_too_many_refused(tmp_path: Path) -> None:
    dat_folder(tmp_path, "utf-8")
    with (tmp_path / "ratings.dat").open("a") as file:
        file.write("7::1::five::964982703\n7::1\n7::1::5::-12\n")
    with pytest.raises(UserError, match=r"3 of 7 lines cannot be read.*the first is line 5 \(a rating that is no"):
        MovieLensFolder(path=str(tmp_path)).read_log()
    log = MovieLensFolder(path=str(tmp_path), max_bad_lines=0.5).read_log()
    assert log.interactions.frame().height == 4
    assert list(log.read[0]["dropped"].values()) == [3]


def test_folders_that_are_not_grouplens(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs `path`"):
        MovieLensFolder()
    with pytest.raises(UserError, match=r"none of these pairs of files: u\.data and u\.item, ratings\.csv"):
        MovieLensFolder(path=str(tmp_path)).read_log()
    csv_folder(tmp_path)
    (tmp_path / "movies.csv").write_text("id,title\n1,x\n")
    with pytest.raises(UserError, match="lacks the columns movieId, genres"):
        MovieLensFolder(path=str(tmp_path)).read_log()


def test_the_real_small_folder(benchmark_data: Path) -> None:
    folder = benchmark_data / "movielens_small"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    reader = MovieLensFolder(path=str(folder), user_k=5, item_k=5, mask_history=True)
    tables, files = reader.read()
    assert tables.users.height == 610
    assert sorted(files) == ["interactions", "items"]
    assert tables.facts["read"][0]["rows"] == 100_836
    assert tables.items["title"][0] == "Toy Story (1995)"
    assert tables.items["category"][0] == "Adventure, Animation, Children, Comedy, Fantasy"
