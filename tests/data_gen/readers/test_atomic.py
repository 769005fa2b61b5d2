from importlib.util import find_spec
from pathlib import Path

import pytest

from reasonrec.data_gen.readers.atomic import AtomicReader, spell_sequence
from reasonrec.data_gen.readers.movielens import package_folder
from reasonrec.tokenizers.errors import UserError

INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\nu1\ta\t4\t1400000000\nu1\tb\t2\t1.4000001e9\n"
ITEM = (
    "item_id:token\tname:token_seq\tclass:token_seq\tprice:float\tmaker:token\n"
    'a\tThe "big" lamp\tHome Light\t1.5\tOak\nb\tPan\tHome\t\t\n'
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "shop.inter").write_text(INTER)
    (tmp_path / "shop.item").write_text(ITEM)
    return tmp_path


def test_both_files(folder: Path) -> None:
    log = AtomicReader(path=str(folder), item_columns={"brand": "maker"}).read_log()
    assert log.name == "shop"
    rows = log.interactions.frame().select("user_id", "item_id", "rating", "timestamp").rows()
    assert rows == [("u1", "a", 4.0, 1_400_000_000_000), ("u1", "b", 2.0, 1_400_000_100_000)]
    assert log.items.rows() == [("a", 'The "big" lamp', "", "Home, Light", "Oak"), ("b", "Pan", "", "Home", "")]
    assert AtomicReader(path=str(folder), min_rating=3).read_log().interactions.frame()["item_id"].to_list() == ["a"]


def test_other_names(folder: Path) -> None:
    (folder / "shop.inter").write_text(INTER.replace("user_id", "uid").replace("timestamp", "time"))
    columns = {"user_id": "uid", "timestamp": "time"}
    log = AtomicReader(path=str(folder), interaction_columns=columns).read_log()
    assert log.interactions.frame()["user_id"].to_list() == ["u1", "u1"]
    with pytest.raises(UserError, match=r"has no column 'user_id'; set interaction_columns\.user_id"):
        AtomicReader(path=str(folder)).read_log()


def test_files_that_are_not_atomic(folder: Path) -> None:
    (folder / "shop.item").write_text("item_id\tname\n1\tx\n")
    with pytest.raises(UserError, match=r"shop\.item: its first line has to name columns with their types"):
        AtomicReader(path=str(folder)).read_log()
    (folder / "shop.item").unlink()
    with pytest.raises(UserError, match=r"has no shop\.item"):
        AtomicReader(path=str(folder)).read_log()
    (folder / "other.inter").touch()
    with pytest.raises(UserError, match=r"one file NAME\.inter; it holds other\.inter, shop\.inter"):
        AtomicReader(path=str(folder)).read_log()


def test_a_line_with_a_field_too_many(folder: Path) -> None:
    (folder / "shop.inter").write_text(f"{INTER}u1\tb\t2\t1400000100\tx\n")
    with pytest.raises(UserError, match=r"1 of 3 lines .*line 4 \(not 4 fields with '\\+t' between"):
        AtomicReader(path=str(folder)).read_log()


@pytest.mark.parametrize(("value", "words"), [(None, ""), ("", ""), ("Sci-Fi", "Sci-Fi"), ("a, b c", "a, b c")])
def test_sequences_of_words(value: str | None, words: str) -> None:
    assert spell_sequence(value) == words


def test_the_packaged_movielens() -> None:
    if find_spec("recbole") is None:
        pytest.skip("the package recbole is not installed")
    log = AtomicReader(path=str((package_folder("recbole") or Path()) / "dataset_example" / "ml-100k")).read_log()
    assert (log.interactions.frame().height, log.items.height) == (100_000, 1682)
    assert log.items.row(0) == ("1", "Toy Story", "", "Animation, Children's, Comedy", "")
