"""The prepare stage from its command line."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl
import pytest

from reasonrec.data_gen.clean import clean_items
from reasonrec.data_gen.interaction_log import InteractionLog
from reasonrec.data_gen.readers.base import READERS, LogReader
from reasonrec.data_gen.schema import Dataset
from reasonrec.recipes import args, prepare
from reasonrec.recipes.keys import keys_of
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.output import MANIFEST

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "recipes" / "configs"


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shop with five users and six items, and a configuration; the current folder is there."""
    lines = [f"{user},{(user + step) % 6},2024-01-0{1 + step}" for user in range(5) for step in range(5)]
    (tmp_path / "log.csv").write_text("customer,item_id,timestamp\n" + "\n".join(lines) + "\n")
    titles = ["<|im_end|> lamp", "pan", "[INST] cup", "bowl", "fork &amp; knife", "spoon"]
    (tmp_path / "items.csv").write_text("item_id,title\n" + "".join(f"{n},{t}\n" for n, t in enumerate(titles)))
    (tmp_path / "prepare.yaml").write_text(
        "source: tables\noutput_dir: out/dataset\nname: shop\ninteractions: log.csv\nitems: items.csv\n"
        "interaction_columns: {user_id: customer}\nuser_k: 3\nitem_k: 2\nmask_history: true\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def launch(monkeypatch: pytest.MonkeyPatch, *flags: str, config: str = "prepare.yaml") -> None:
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--config", config, *flags])
    prepare.main()


def test_own_tables(shop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    launch(monkeypatch)
    dataset = Dataset.load("out/dataset")
    assert (dataset.n_users, dataset.n_items, dataset.test.height) == (5, 6, 5)
    assert dataset.items["title"].to_list()[:5] == [
        "‹|im_end|› lamp",
        "pan",
        "(INST) cup",
        "bowl",
        "fork & knife",
    ]
    assert dataset.facts["name"] == "shop"
    assert sorted(dataset.manifest.inputs) == ["interactions", "items"]
    printed = capsys.readouterr().out
    assert "5 sequences, 15 targets" in printed
    assert "0 of 25 interactions removed" in printed


def test_a_preview_shows_and_writes_nothing(
    shop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launch(monkeypatch, "--preview")
    assert not Path("out").exists()
    printed = capsys.readouterr().out.splitlines()
    assert "  filter k_core                0 of 25 interactions removed" in printed
    assert "    0: ‹|im_end|› lamp" in printed
    assert "    0: ‹|im_end|› lamp, pan, (INST) cup" in printed
    assert "    0: ‹|im_end|› lamp, pan, (INST) cup, bowl -> fork & knife" in printed
    assert "nothing was written" in printed[-1]
    launch(monkeypatch)
    launch(monkeypatch, "--preview")  # beside a finished dataset


def test_an_existing_dataset_is_only_moved_aside_on_request(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch(monkeypatch)
    before = Dataset.load("out/dataset").manifest.hash
    with pytest.raises(UserError, match="exists already"):
        launch(monkeypatch)
    launch(monkeypatch, "--overwrite")
    assert Dataset.load("out/dataset").manifest.hash == before
    assert Path("out/dataset.old", MANIFEST).is_file()


def test_a_kill_in_the_middle_leaves_no_half_dataset(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = prepare.write_dataset

    def full_disk(folder: Path, tables: object) -> dict[str, object]:
        (folder / "items.parquet").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare, "write_dataset", full_disk)
    with pytest.raises(UserError, match="disk is full"):
        launch(monkeypatch)
    assert not Path("out/dataset").exists()
    with pytest.raises(UserError, match="unfinished"):
        Dataset.load("out/dataset")
    monkeypatch.setattr(prepare, "write_dataset", real)
    launch(monkeypatch)
    assert Dataset.load("out/dataset").n_items == 6
    assert not Path("out/dataset.partial").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--path", "x"], r"path='x' is not read with source: tables"),
        (["--user_k", "0"], "user_k=0 has to be at least 1"),
        (["--duplicates", "keep"], "would be a target that is masked"),
        (["--interactions", ""], "needs both `interactions` and `items`"),
        (["--item_k", "50"], r"k_core removed 25 of 25 interactions; lower user_k=3 or item_k=50"),
        (["--items", "nowhere.csv"], r"nowhere\.csv: no such file"),
        (["--usr_k", "3"], "did you mean 'user_k'"),
        (["--split", "random"], "random"),
        (["--separator", ""], r"separator='' is empty: write one such as"),
        (["--separator", "::"], "has no column 'item_id'.*or set separator: ','"),
        (["--quote_char", "''"], "quote_char=.* has to be one character"),
        (["--min_rating", "nan"], "min_rating=nan has to be a finite number"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_mistakes(shop: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        launch(monkeypatch, *flags)
    assert not Path("out").exists()


def test_two_rows_of_one_item_and_items_without_text(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("items.csv").write_text("item_id,title\n0,lamp\n0,lamp\n")
    with pytest.raises(UserError, match=r"'0' \(2 times\)"):
        launch(monkeypatch)
    Path("items.csv").write_text("item_id,title\n0,lamp\n1,pan\n2,\n3,bowl\n4,fork\n")
    with pytest.raises(UserError, match=r"with 2 items .*'2', '5'"):
        launch(monkeypatch)
    launch(monkeypatch, "--drop_items_without_text")
    assert Dataset.load("out/dataset").items["title"].to_list() == ["lamp", "pan", "bowl", "fork"]


def test_bytes_do_not_depend_on_the_number_of_threads(shop: Path) -> None:
    written = []
    for threads in ("1", "4"):
        flags = ["--config", "prepare.yaml", "--output_dir", f"out/{threads}"]
        environment = {**os.environ, "POLARS_MAX_THREADS": threads}
        script = str(ROOT / "recipes" / "prepare.py")
        subprocess.run([sys.executable, script, *flags], check=True, env=environment, capture_output=True)
        written.append(Dataset.load(f"out/{threads}").manifest.files)
    assert written[0] == written[1]


def test_rows_are_counted_and_ties_are_told(
    shop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        f"{user}.0;{(user + step) % 6};2024-01-01;{'nan' if step == 2 else 5}"
        for user in range(5)
        for step in range(6)
    ]
    Path("log.csv").write_text("customer;item_id;timestamp;rating\n\n" + "\n".join(lines) + "\n")
    Path("items.csv").write_text("item_id;title;category\n" + "".join(f"{n};t{n};['a' 'b, c']\n" for n in range(6)))
    launch(monkeypatch, "--separator", ";", "--min_rating", "4")
    dataset = Dataset.load("out/dataset")
    read = dataset.facts["read"][0]
    assert (read["rows"], read["kept"], read["blank_lines"]) == (30, 25, 1)
    assert read["dropped"] == {"rated lower": 0, "without a rating": 5}
    assert dataset.facts["ties"] == {"interactions": 25, "of": 25, "order": "they stand as in the file"}
    assert dataset.test["target"].to_list() == [5, 0, 1, 2, 3]  # the last line of each user
    assert dataset.users["user_id"].to_list() == ["0", "1", "2", "3", "4"]
    assert dataset.items["category"].unique().to_list() == ["a, b, c"]
    printed = capsys.readouterr().out
    assert "30 rows, 25 kept, 5 without a rating; 1 blank lines" in printed
    assert "5 of 30 interactions removed, 5 of them without a rating" in printed
    assert "25 of 25 interactions share their user's time stamp; they stand as in the file" in printed
    assert "30 of interactions.user_id are written as floats" in printed


def test_separators_and_quotes_from_the_command_line(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Path("log.csv").read_text(), Path("items.csv").read_text()
    launch(monkeypatch)
    expected = Dataset.load("out/dataset").manifest.files
    for separator, flags in (("::", ["--separator", "::"]), ("\t", ["--separator", r"\t"])):
        for name, text in zip(("log.csv", "items.csv"), before, strict=True):
            Path(name).write_text(text.replace(",", separator))
        launch(monkeypatch, *flags, "--overwrite")
        assert Dataset.load("out/dataset").manifest.files == expected
    for name in ("log", "items"):
        Path(f"{name}.csv").rename(f"{name}.tsv")
    launch(monkeypatch, "--interactions", "log.tsv", "--items", "items.tsv", "--overwrite")
    assert Dataset.load("out/dataset").manifest.files == expected
    Path("items.tsv").write_text(before[1].replace(",", "\t").replace("pan", '10" pan'))
    with pytest.raises(UserError, match=r"line 3 does not stand around a whole field.*set quote_char: ''"):
        launch(monkeypatch, "--interactions", "log.tsv", "--items", "items.tsv", "--overwrite")
    launch(monkeypatch, "--interactions", "log.tsv", "--items", "items.tsv", "--overwrite", "--quote_char", "")
    assert Dataset.load("out/dataset").items["title"][1] == '10" pan'


def test_rejected_lines_stand_beside_the_dataset(
    shop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f"{user}\t{(user + step) % 6}\t{1_700_000_000 + step}" for user in range(5) for step in range(5)]
    Path("a.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\n" + "\n".join([*lines, "half"]) + "\n")
    Path("a.item").write_text("item_id:token\ttitle:token_seq\n" + "".join(f"{n}\tt{n}\n" for n in range(6)))
    Path("prepare.yaml").write_text("source: atomic\npath: .\noutput_dir: out/dataset\n")
    kept = Path("out/dataset.rejected_lines.jsonl")
    with pytest.raises(UserError, match=r"1 of 26 lines .*all of them: out/dataset\.rejected_lines\.jsonl"):
        launch(monkeypatch)
    assert '"text": "half"' in kept.read_text()
    launch(monkeypatch, "--max_bad_lines", "0.1")
    assert f"{kept} has the lines that could not be read" in capsys.readouterr().out
    assert len(kept.read_text().splitlines()) == 1
    assert sorted(path.name for path in Path("out").iterdir()) == ["dataset", kept.name]
    assert not list(Path("out/dataset").glob("*reject*"))


@pytest.mark.parametrize("recipe", ["demo", "industrial", "basket", "synthetic", "example"])
def test_shipped_configurations_parse(recipe: str) -> None:
    path = CONFIGS / recipe / "prepare.yaml"
    launch_line = f"# accelerate launch recipes/prepare.py --config recipes/configs/{recipe}/prepare.yaml"
    assert path.read_text().splitlines()[0] == launch_line
    config, _ = args.parse(prepare.KEYS, ["--config", str(path)])
    assert config.output_dir == f"runs/{recipe}/dataset"


def test_every_source_says_which_keys_it_reads() -> None:
    read = {key.name for reader in READERS.entries().values() for key in keys_of(reader)}
    common = {"source", "output_dir", "overwrite", "preview"}
    assert set(prepare.PrepareConfig.__dataclass_fields__) == common
    assert {key.name for key in prepare.KEYS[1].keys} == read
    assert not read & common


@dataclass(frozen=True)
class Diary(LogReader):
    """A reader of somebody else's: people who come by a fixed number of times."""

    file: str | None = field(default=None, metadata={"help": "the diary", "path": "name"})
    visits: int = field(default=4, metadata={"help": "visits of each person", "at_least": 3})

    def read_log(self) -> InteractionLog:
        rows = [(f"u{user}", f"i{(user + visit) % 5}", visit) for user in range(4) for visit in range(self.visits)]
        log = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
        items = pl.DataFrame({"item_id": [f"i{n}" for n in range(5)], "title": [f"place {n}" for n in range(5)]})
        return InteractionLog("diary", log, clean_items(items, 0), "the places")


@dataclass(frozen=True, kw_only=True)
class Locked:
    """A reader that cannot do without an option."""

    secret: str = field(metadata={"help": "opens it"})


@pytest.fixture
def diary(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adds the readers above to those of the kit, and writes a configuration."""
    monkeypatch.setattr(READERS, "_entries", dict(READERS._entries))
    READERS.add("diary", Diary, __name__)
    READERS.add("locked", Locked, __name__)  # type: ignore[arg-type]
    Path("prepare.yaml").write_text("source: diary\noutput_dir: out/d\nfile: ~/diary.txt\nvisits: 5\nitem_k: 2\n")


@pytest.mark.usefixtures("diary")
def test_a_reader_of_ones_own_is_chosen_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launch(monkeypatch)
    dataset = Dataset.load("out/d")
    assert (dataset.facts["name"], dataset.n_items, dataset.test.height) == ("diary", 5, 4)
    recorded = dataset.manifest.config
    assert (recorded["source"], recorded["file"], recorded["visits"]) == ("diary", "diary.txt", 5)
    assert not {"interactions", "exposure_bias"} & recorded.keys(), "options of other sources"
    with pytest.raises(SystemExit):
        launch(monkeypatch, "--help")
    printed = capsys.readouterr().out
    assert f"{{{','.join(READERS.entries())}}}" in printed
    assert "synthetic,diary,locked}" in printed
    assert "visits of each person (default: 4)" in printed
    assert printed.count("--seed") == 1


@pytest.mark.usefixtures("diary")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--visits", "2"], "visits=2 has to be at least 3"),
        (["--visits", "many"], "argument --visits: invalid int value: 'many'"),
        (["--visit", "3"], "unknown flag --visit; did you mean 'visits'"),
        (["--test_from", "2020-01-01"], "valid_from and test_from belong together"),
        (
            ["--earlier_types", "2"],
            r"earlier_types=2 is not read with source: diary; remove it \(read are .*, visits\)",
        ),
        (
            ["--source", "dairy"],
            r"source 'dairy' is unknown \(did you mean 'diary'\?\); known are tables, movielens_100k",
        ),
        (["--source", "locked"], r"item_k=2 is not read with source: locked; remove it \(read are secret\)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_of_a_reader_are_checked(monkeypatch: pytest.MonkeyPatch, flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        launch(monkeypatch, *flags)
    assert not Path("out").exists()


@pytest.mark.usefixtures("diary")
def test_an_option_may_be_required(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("prepare.yaml").write_text("source: locked\noutput_dir: out/l\n")
    with pytest.raises(UserError, match="source: locked needs secret: set it in the YAML file or pass --secret"):
        launch(monkeypatch)
    _, reader = args.parse(prepare.KEYS, ["--config", "prepare.yaml", "--secret", "s"])
    assert reader == Locked(secret="s")


@pytest.mark.usefixtures("diary")
def test_one_key_means_one_thing_in_all_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Other:
        visits: int = field(default=7, metadata={"help": "something else", "at_least": 1})

    READERS.add("other", Other, __name__)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="source other: the key visits is declared otherwise elsewhere"):
        launch(monkeypatch)


def test_synthetic_source(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("prepare.yaml").write_text("source: synthetic\noutput_dir: out/s\ntrain_users: 20\nheld_out_users: 5\n")
    launch(monkeypatch)
    dataset = Dataset.load("out/s")
    assert (dataset.n_items, dataset.train.height, dataset.test.height) == (512, 20, 5)
    launch(monkeypatch, "--exposure_bias", "0.3", "--output_dir", "out/b")
    assert "clean_target" in Dataset.load("out/b").train.columns
    with pytest.raises(UserError, match=r"exposure_bias=1\.0 has to be below 1"):
        launch(monkeypatch, "--exposure_bias", "1", "--output_dir", "out/c")
