from importlib.util import find_spec
from pathlib import Path

import pytest

from reasonrec.data_gen.interaction_log import LogOptions, build_tables
from reasonrec.data_gen.readers.movielens import movie_title, read_movielens_100k
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
