import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from reasonrec.data_gen.readers.minionerec import NAME, TIMES, read_industrial
from reasonrec.data_gen.schema import count_targets
from reasonrec.tokenizers.errors import UserError

HEADER = "user_id:token\titem_id_list:token_seq\titem_id:token\n"


def small_split(folder: Path, test_history: str = "0 1 1") -> Path:
    """Users 0 and 1; user 1's first row is a test row."""
    folder.mkdir()
    for part, lines in {
        "train": "0\t0\t1\n0\t0 1\t1\n",
        "valid": "",
        "test": f"0\t{test_history}\t2\n1\t2\t0\n",
    }.items():
        (folder / f"{NAME}.{part}.inter").write_text(HEADER + lines)
    texts = {
        str(item): {
            "title": f"T{item} <|a_1|>",
            "description": "['one', 'two']",
            "brand": "B",
            "categories": "",
        }
        for item in range(3)
    }
    (folder / f"{NAME}.item.json").write_text(json.dumps(texts))
    return folder


def test_small_split_by_hand(tmp_path: Path) -> None:
    folder = small_split(tmp_path / "split")
    (folder / TIMES).write_text(
        "user\tposition\titem\tsplit\trow\tts_lo\tts_hi\texact\trating\n"
        "0\t0\t0\tfirst\t\t1\t1\t1\t5\n0\t1\t1\ttrain\t0\t1\t1\t1\t5\n0\t2\t1\ttrain\t1\t9\t9\t1\t5\n"
        "0\t3\t2\ttest\t2\t9\t9\t1\t5\n1\t0\t2\tfirst\t\t1\t9\t0\t5\n1\t1\t0\ttest\t3\t1\t9\t0\t5\n"
    )
    tables, files = read_industrial(str(folder), 100)
    assert sorted(files) == ["items", "test", "times", "train", "valid"]
    assert tables.train.to_dicts() == [{"user": 0, "items": [0, 1, 1], "first_target": 1}]
    assert tables.test.select("row", "user", "history", "target", "same_time").rows() == [
        (0, 0, [0, 1, 1], 2, True),
        (1, 1, [2], 0, False),  # the day is not known
    ]
    assert tables.items.row(0) == (0, "0", "T0 ‹|a_1|›", "one two", "", "B")
    assert tables.valid.height == 0


def test_missing_and_inconsistent_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"lacks {NAME}\.train\.inter.*put there"):
        read_industrial(str(tmp_path), 100)
    with pytest.raises(UserError, match=r"1 rows do not continue .* user 0, history \[0, 2, 1\]"):
        read_industrial(str(small_split(tmp_path / "other", "0 2 1")), 100)


def test_published_counts_and_popularity(benchmark_data: Path) -> None:
    folder = benchmark_data / "industrial"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    tables, _ = read_industrial(str(folder), 2000)
    assert (tables.users.height, tables.items.height) == (7694, 3686)
    assert (tables.valid.height, tables.test.height) == (4532, 4533)
    counts = count_targets(tables.train, 3686)
    assert counts.sum() == 36_259
    assert tables.test["same_time"].mean() == pytest.approx(0.39, abs=0.005)
    seen = set(tables.train["items"].explode().to_list())
    assert tables.test.filter(~pl.col("target").is_in(list(seen))).height == 147
    assert tables.test.filter(pl.col("history").list.contains(pl.col("target"))).height == 128
    rank = np.empty(3686, dtype=int)
    rank[np.argsort(-counts, kind="stable")] = np.arange(3686)
    ranks = rank[tables.test["target"].to_numpy()]
    assert np.mean(ranks < 10) == pytest.approx(0.0567, abs=0.0005)
    assert np.mean(np.where(ranks < 10, 1 / np.log2(ranks + 2), 0)) == pytest.approx(0.0411, abs=0.0005)
    assert not tables.items["description"].str.starts_with("[").any()
    assert not tables.items["description"].str.starts_with("('").any()
