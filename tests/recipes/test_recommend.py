"""One recommendation from the command line: a user or item ids in, titles and scores out."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from reasonrec.data_gen.schema import Dataset
from reasonrec.recipes import recommend
from reasonrec.recipes.recommender import Recommender

LINE = re.compile(r"^ *(\d+)  (.{60})  id (\S+) +log-prob (-\d+\.\d\d)$", re.MULTILINE)


@pytest.fixture(scope="module")
def dataset(tiny_dataset: Path) -> Dataset:
    return Dataset.load(tiny_dataset)


@pytest.fixture
def ask(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str, str]]:
    """Run the stage in this process; gives what it printed, and its error."""

    def run(*flags: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["recommend.py", "--model", str(adapter), *flags])
        with contextlib.suppress(SystemExit):
            recommend.run(recommend.main)()
        out, error = capsys.readouterr()
        assert "Traceback" not in error
        return out, "\n".join(line for line in error.splitlines() if line.startswith("error: "))

    return run


def test_by_item_ids(stage: Callable[..., subprocess.CompletedProcess[str]], adapter: Path, dataset: Dataset) -> None:
    history = [3, 17, 40]
    ids, titles = dataset.items["item_id"].to_list(), dataset.items["title"].to_list()
    printed = stage(
        "recommend", "--model", str(adapter), "--history", ", ".join(ids[i] for i in history), "--k", "7"
    ).stdout
    assert "history (3 items, the last 3):" in printed
    assert printed.index(titles[3]) < printed.index(titles[17]) < printed.index(titles[40])
    items, scores = Recommender.from_pretrained(adapter).rank([history], k=7)
    lines = LINE.findall(printed)
    assert [int(rank) for rank, *_ in lines] == list(range(1, 8))
    assert [title.strip() for _, title, *_ in lines] == [titles[i] for i in items[0]]
    assert [item_id for *_, item_id, _ in lines] == [ids[i] for i in items[0]]
    assert [float(score) for *_, score in lines] == pytest.approx(scores[0].tolist(), abs=0.006)


def test_by_user_everything_known_is_read(ask: Callable[..., tuple[str, str]], dataset: Dataset) -> None:
    case = dataset.test.row(0, named=True)
    known = [*case["history"], case["target"]]
    user = dataset.users["user_id"][case["user"]]
    ids = dataset.items["item_id"].to_list()
    printed = ask("--user", user)[0]
    assert f"history ({len(known)} items, the last 5):" in printed
    assert printed == ask("--history", ",".join(ids[i] for i in known))[0]
    trained = dataset.train.row(0, named=True)
    printed = ask("--user", dataset.users["user_id"][trained["user"]])[0]
    assert f"history ({len(trained['items'])} items, the last 5):" in printed


def test_repeats_are_as_the_data_set_says_unless_told(ask: Callable[..., tuple[str, str]], dataset: Dataset) -> None:
    history = set(dataset.items["item_id"].to_list()[:40])
    words = ["--history", ",".join(sorted(history)), "--k", "48"]
    printed = ask(*words)[0]
    assert "repeats allowed" in printed
    assert len(LINE.findall(printed)) == 48
    printed = ask(*words, "--repeats", "false")[0]
    assert "nothing seen before" in printed
    left = [item_id for *_, item_id, _ in LINE.findall(printed)]
    assert len(left) == 8, "a list ends where the catalogue does"
    assert not history & set(left)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--history", "0-0-0,lamp", "--strict"], ["item lamp is not in the catalogue", "some ids are 0-0-0"]),
        (["--user", "nobody"], ["--user nobody", "some are u0"]),
        ([], ["either --user or --history"]),
        (["--user", "u0", "--history", "0-0-0"], ["either --user or --history"]),
        (["--user", "u0", "--model", "nowhere"], ["nowhere", "check the path"]),
        (["--user", "u\x1b[2J\u202e"], [r"--user u\x1b[2J\u202e: no such user"]),
        (["--user", "u\udcff"], [r"user='u\udcff' has to be text in UTF-8"]),
        (["--history", "a\r\x1b[1A,b", "--strict"], [r"item a\r\x1b[1A is not in the catalogue"]),
        (["--user", "u0", "--k", "10000000"], ["k=10000000 has to be a whole number, from 1 to 1,000,000"]),
        (["--user", "u0", "--titles", "lamp"], ["unknown flag --titles"]),
    ],
)
def test_mistakes_are_named(ask: Callable[..., tuple[str, str]], flags: list[str], words: list[str]) -> None:
    out, error = ask(*flags)
    assert not LINE.findall(out)
    assert all(word in error for word in words), error
