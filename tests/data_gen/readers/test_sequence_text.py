from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonrec.data_gen.readers.sequence_text import SequenceTextReader
from reasonrec.tokenizers.errors import UserError

SEQUENCES = st.dictionaries(
    st.integers(1, 50), st.lists(st.integers(1, 6), min_size=2, max_size=8), min_size=1, max_size=8
)


def reader_of(folder: Path, text: str, **options: float) -> SequenceTextReader:
    (folder / "Shop.txt").write_text(text)
    (folder / "items.csv").write_text("id,title\n" + "".join(f"{n},item {n}\n" for n in range(1, 7)))
    columns = {"item_id": "id"}
    files = {"sequences": str(folder / "Shop.txt"), "items": str(folder / "items.csv")}
    return SequenceTextReader(**files, item_columns=columns, **options)  # type: ignore[arg-type]


def by_user(reader: SequenceTextReader) -> dict[str, list[str]]:
    log = reader.read_log().interactions.sort("timestamp")
    grouped = log.group_by("user_id", maintain_order=True).agg("item_id")
    return dict(grouped.iter_rows())


@given(SEQUENCES)
def test_both_forms_are_the_same_data(
    tmp_path_factory: pytest.TempPathFactory, sequences: dict[int, list[int]]
) -> None:
    folder = tmp_path_factory.mktemp("shop")
    wanted = {str(user): [str(item) for item in items] for user, items in sequences.items()}
    pairs = "".join(f"{user} {item}\n" for user, items in sequences.items() for item in items)
    assert by_user(reader_of(folder, pairs)) == wanted
    lines = "".join(f"{user}  {' '.join(map(str, items))} \r\n" for user, items in sequences.items())
    assert by_user(reader_of(folder, lines)) == wanted


def test_a_dataset(tmp_path: Path) -> None:
    tables, files = reader_of(tmp_path, "1 1\n1 2\n2 3\n1 3\n2 1\n2 2\n").read()
    assert tables.test.select("history", "target").rows() == [([0, 1], 2), ([2, 0], 1)]
    assert tables.items["title"].to_list() == ["item 1", "item 2", "item 3"]
    assert sorted(files) == ["interactions", "items"]


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"1 of 4 lines .*line 3 \(not two words"):
        reader_of(tmp_path, "1 1\n1 2\n1\n1 3\n").read_log()
    assert by_user(reader_of(tmp_path, "1 1\n1 2\n1\n1 3\n", max_bad_lines=0.5)) == {"1": ["1", "2", "3"]}
    with pytest.raises(UserError, match="line 1 is longer than `user item` and not the only one of user '1'"):
        reader_of(tmp_path, "1 2 5 1400000000\n1 3 4 1400000001\n").read_log()
    with pytest.raises(UserError, match=r"Shop\.txt holds no row"):
        reader_of(tmp_path, "\n").read_log()
    with pytest.raises(UserError, match="numbers only"):
        SequenceTextReader(sequences="x.txt")
    with pytest.raises(UserError, match="has an order only"):
        SequenceTextReader(sequences="x.txt", items="y.csv", split="time")
    with pytest.raises(UserError, match=r"nowhere\.txt cannot be read"):
        SequenceTextReader(sequences=str(tmp_path / "nowhere.txt"), items="y.csv").read_log()
