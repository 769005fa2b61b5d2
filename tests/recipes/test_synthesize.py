"""The stage that writes traces, and the training that reads them, from command line to artefact."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from reasonrec.data_gen.reasoning.traces import STAGES, Traces
from reasonrec.data_gen.schema import Dataset
from reasonrec.data_gen.tasks.choice import TaskChoice
from reasonrec.recipes import sft, synthesize
from reasonrec.recipes.evaluation.leak import chain_items, chain_words, describe_leak, leak_test
from reasonrec.recipes.models import card as model_card
from reasonrec.tokenizers.artefact import read_manifest, write_manifest
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.output import resume_folder

ROOT = Path(__file__).parents[2]


def synthesized(dataset: Path, out: Path, monkeypatch, *flags: str) -> Path:
    words = ["--dataset", str(dataset), "--output_dir", str(out), "--rows", "150", "--max_history", "6", *flags]
    monkeypatch.setattr(sys, "argv", ["synthesize.py", *words])
    synthesize.main()
    return out


@pytest.fixture(scope="module")
def traces(tiny_dataset, tiny_index, tiny_base, tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        flags = ("--index", str(tiny_index), "--model", str(tiny_base), "--max_tokens", "400")
        return synthesized(tiny_dataset, tmp_path_factory.mktemp("traces") / "traces", patch, *flags)


def test_the_artefact_and_its_report(traces, tiny_dataset):
    dataset = Dataset.load(tiny_dataset)
    loaded = Traces.load(traces, dataset.manifest)
    report = json.loads((traces / "report.json").read_text())
    assert report["teacher"] == {"name": "grounded", "kind": "grounded", "hindsight": False}
    assert report["train"]["cases"] == 150
    assert report["train"]["kept"] == len(loaded.train)
    assert report["valid"]["kept"] == len(loaded.valid) == 30
    lost = sum(report["train"]["no_reply"].values()) + sum(report["train"]["rejected"].values())
    assert report["train"]["kept"] + lost == 150
    missed = report["train"]["formulation"]["misses it"]
    assert 0 < missed < 150
    assert report["train"]["stages"]["formulation"] == 150 - missed
    assert {"right", "wrong", "all"} == set(report["easy_rows"])
    assert set(report["leak"]) >= {"words", "items", "both", "chain_knows_more"}
    assert all(trace.formulation for trace in loaded.valid), "validation chains are not chosen by their targets"
    assert all(0 < trace.tokens <= 400 for trace in loaded.train)
    sequences = dataset.train["items"].to_list()
    for trace in loaded.train:
        items = sequences[trace.row]
        assert items[trace.position] == trace.target
        assert list(trace.history) == items[max(0, trace.position - 6) : trace.position]
    assert {name: loaded.manifest.facts[name] for name in ("n_train", "n_valid")} == {"n_train": 150, "n_valid": 30}


def test_the_same_again_byte_for_byte(traces, tiny_dataset, tiny_index, tiny_base, tmp_path, monkeypatch):
    flags = ("--index", str(tiny_index), "--model", str(tiny_base), "--max_tokens", "400")
    again = synthesized(tiny_dataset, tmp_path / "again", monkeypatch, *flags)
    for name in ("train.parquet", "valid.parquet", "report.json"):
        assert (again / name).read_bytes() == (traces / name).read_bytes(), name


def changed_copy(dataset: Path, folder: Path) -> Path:
    """The dataset with other held-out targets."""
    shutil.copytree(dataset, folder)
    facts = Dataset.load(dataset).facts
    for split in ("valid", "test"):
        rows = pl.read_parquet(folder / f"{split}.parquet")
        other = (rows["target"].to_numpy() + 7) % facts["n_items"]
        rows.with_columns(pl.Series("target", other, dtype=pl.Int32)).write_parquet(folder / f"{split}.parquet")
    write_manifest(folder, kind="dataset", config={}, facts=facts)
    return folder


@pytest.fixture(scope="module")
def other_traces(tiny_dataset, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("other")
    with pytest.MonkeyPatch.context() as patch:
        return synthesized(changed_copy(tiny_dataset, folder / "dataset"), folder / "traces", patch)


def test_other_held_out_targets_change_no_word(tiny_dataset, other_traces, tmp_path, monkeypatch):
    plain = synthesized(tiny_dataset, tmp_path / "plain", monkeypatch)
    assert (plain / "train.parquet").read_bytes() == (other_traces / "train.parquet").read_bytes()
    first, second = (pl.read_parquet(folder / "valid.parquet") for folder in (plain, other_traces))
    assert first.select("key", "history", *STAGES, "guess").equals(second.select("key", "history", *STAGES, "guess"))
    assert not first["target"].equals(second["target"])


@pytest.mark.parametrize("on_miss", ["drop", "keep"])
def test_what_happens_to_misses(on_miss, traces, tiny_dataset, tmp_path, monkeypatch):
    made = Traces.load(synthesized(tiny_dataset, tmp_path / "out", monkeypatch, "--on_miss", on_miss))
    stripped = Traces.load(traces)
    hits = [trace.key for trace in stripped.train if trace.hit]
    assert [trace.key for trace in made.train] == (hits if on_miss == "drop" else [t.key for t in stripped.train])
    assert all(trace.formulation for trace in made.train)


# The leak test.


def test_the_leak_test_finds_a_planted_leak_and_nothing_in_honest_chains(traces, tiny_dataset):
    dataset = Dataset.load(tiny_dataset)
    honest = Traces.load(traces).valid
    result = leak_test(dataset, honest)
    assert result is not None
    assert not result["chain_knows_more"]
    assert "give it away" not in describe_leak(result)
    titles = dataset.items["title"].to_list()
    nothing = dict.fromkeys(STAGES)
    telling = [replace(trace, **nothing | {"intent": f"something {titles[trace.target]}"}) for trace in honest]
    leak = leak_test(dataset, telling)
    assert leak is not None
    assert leak["words"]["chain"] > leak["words"]["history"] + 0.2
    assert leak["words"]["history"] == result["words"]["history"]
    assert leak["words"]["ci95"][0] > 0
    assert leak["chain_knows_more"]
    assert "they may give it away" in describe_leak(leak)
    assert leak_test(dataset, []) is None


def test_what_a_retriever_reads(traces, tiny_dataset):
    titles = Dataset.load(tiny_dataset).items["title"].to_list()
    trace = replace(
        Traces.load(traces).valid[0], history=(3, 1, 2), evidence="oak [2]", preference="a", intent="b",
        formulation=None, rewriting="[3][2]",
    )  # fmt: skip
    assert chain_items(trace) == [3, 2]
    assert chain_words(trace, titles) == f"oak  {titles[2]} . a . b . {titles[3]} {titles[2]} ."


# Teachers with an endpoint.


@pytest.fixture
def server() -> Iterator[str]:
    script = ROOT / "tests" / "data_gen" / "reasoning" / "teachers" / "endpoint_server.py"
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    process.kill()
    process.wait()


def asked(server: str) -> int:
    with urllib.request.urlopen(server) as response:
        return int(json.load(response)["posts"])


def test_an_endpoint_teaches_and_no_reply_is_paid_for_twice(server, tiny_dataset, tmp_path, monkeypatch):
    flags = ["--teacher", "endpoint", "--teacher_model", "m", "--requests_per_minute", "60000", "--pause_s", "0.01"]
    flags += ["--timeout_s", "60", "--valid_rows", "10", "--rows", "30"]
    broken = ["--endpoint", f"{server}/error/v1", "--retries", "0"]
    with pytest.raises(UserError, match="run the same command again when it answers"):
        synthesized(tiny_dataset, tmp_path / "out", monkeypatch, *flags, *broken)
    assert not (tmp_path / "out").exists()
    working = ["--endpoint", f"{server}/flaky/v1", "--hindsight", "true"]
    out = synthesized(tiny_dataset, tmp_path / "out", monkeypatch, *flags, *working)
    report = json.loads((out / "report.json").read_text())
    assert report["teacher"] == {"name": f"m at {server}/flaky/v1", "kind": "endpoint", "hindsight": True}
    assert report["train"]["kept"] == 30
    assert report["train"]["no_reply"] == {}
    assert Traces.load(out).manifest.facts["teacher"]["hindsight"] is True
    before = asked(server)
    synthesized(tiny_dataset, tmp_path / "out", monkeypatch, *flags, *working, "--overwrite", "true")
    assert asked(server) == before
    assert len((tmp_path / "out.replies.jsonl").read_text().splitlines()) == 40


def test_a_local_model_that_says_nothing_of_use_is_counted(tiny_dataset, tiny_base, tmp_path, monkeypatch):
    flags = ("--teacher", "local", "--teacher_model", str(tiny_base), "--max_new_tokens", "4", "--valid_rows", "2")
    out = synthesized(tiny_dataset, tmp_path / "out", monkeypatch, *flags, "--rows", "6")
    report = json.loads((out / "report.json").read_text())
    assert report["train"]["kept"] == 0
    assert report["train"]["rejected"]["not in five stages"] + report["train"]["no_reply"].get("empty", 0) == 6
    assert report["leak"] is None


def test_two_processes_go_on_with_what_a_local_model_wrote(stage, stage_on_two, tiny_dataset, tiny_base, tmp_path):
    """Of a run of one process that was killed in the middle of a batch and of a line."""
    flags = ["--dataset", str(tiny_dataset), "--teacher", "local", "--teacher_model", str(tiny_base)]
    flags += ["--max_new_tokens", "4", "--precision", "fp32", "--concurrency", "3"]
    flags += ["--rows", "13", "--valid_rows", "4", "--max_history", "6"]
    one, two = tmp_path / "one" / "traces", tmp_path / "two" / "traces"
    stage("synthesize", *flags, "--output_dir", str(one))
    log = one.with_name("traces.replies.jsonl").read_bytes()
    lines = log.splitlines(keepends=True)
    two.parent.mkdir()
    two.with_name("traces.replies.jsonl").write_bytes(b"".join(lines[:5]) + lines[5][:20])
    done = stage_on_two("synthesize", *flags, "--output_dir", str(two))
    assert done.stdout.count("traces written in") == 1, "one process writes"
    assert two.with_name("traces.replies.jsonl").read_bytes() == log
    assert read_manifest(two).files == read_manifest(one).files


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--teacher", "endpoint"], "teacher: endpoint needs teacher_model"),
        (["--hindsight", "true"], "grounded reads no LLM and is blind"),
        (["--endpoint", "https://u:p@h/v1"], "put the key into the environment variable OPENAI_API_KEY"),
        (["--api_key_env", "sk-1"], "api_key_env is the name of an environment variable .*not the key itself"),
        (["--timeout_s", "1e9"], "timeout_s=1000000000.0 has to be at most 86400"),
        (["--max_reply_bytes", "0"], "max_reply_bytes=0 has to be at least 1"),
        (["--index", "x"], "give both, or neither"),
        (["--min_history", "9"], "min_history=9 is above max_history=6"),
        (["--rows", "0"], "rows=0 has to be at least 1"),
        (["--label_field", "brand"], "no item has a brand"),
    ],
)
def test_mistakes(flags, message, tiny_dataset, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=message):
        synthesized(tiny_dataset, tmp_path / "out", monkeypatch, *flags)


# Training on traces.

CURRICULUM = "{alignment: {share: 2, seqrec: 1}, evidence: {share: 1, evidence: 1}, whole: {share: 1, reason: 1}}"


def train(out: Path, monkeypatch, dataset: Path, index: Path, base: Path, *flags: str) -> Path:
    values = {"dataset": dataset, "index": index, "model": base, "output_dir": out, "method": "lora", "lora_r": 2}
    values |= {"max_history": 6, "num_train_epochs": 0.4, "per_device_train_batch_size": 8, "save_steps": 2}
    values |= {"report_to": "none", "disable_tqdm": True, "lora_dropout": 0.1, "bf16": False, "learning_rate": 1e-3}
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["sft.py", *words, *flags])
    sft.main()
    return out


@pytest.fixture(scope="module")
def adapter(traces, tiny_dataset, tiny_index, tiny_base, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("reason") / "sft"
    with pytest.MonkeyPatch.context() as patch:
        flags = ("--traces", str(traces), "--curriculum", CURRICULUM)
        return train(out, patch, tiny_dataset, tiny_index, tiny_base, *flags)


def test_a_curriculum_trains_and_shows_what_it_fed(adapter, traces):
    manifest = json.loads((adapter / "manifest.json").read_text())
    assert manifest["inputs"]["traces"] == json.loads((traces / "manifest.json").read_text())["hash"]
    assert (adapter / "curriculum.png").stat().st_size > 5000
    log = json.loads((adapter / "train_metrics.json").read_text())
    assert np.isfinite(log["train"]["train_loss"])


def test_a_run_killed_in_the_middle_of_a_phase_ends_the_same(
    adapter, traces, tiny_dataset, tiny_index, tiny_base, tmp_path, monkeypatch
):
    flags = ("--traces", str(traces), "--curriculum", CURRICULUM)
    out = tmp_path / "sft"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model_card, "write_card", killed)  # training is done, the artefact is not
        with pytest.raises(KeyboardInterrupt):
            train(out, patch, tiny_dataset, tiny_index, tiny_base, *flags, "--save_total_limit", "99")
    steps = sorted(int(path.name.split("-")[1]) for path in resume_folder(out).glob("checkpoint-*"))
    assert len(steps) > 2
    for step in steps[1:]:
        shutil.rmtree(resume_folder(out) / f"checkpoint-{step}")
    train(out, monkeypatch, tiny_dataset, tiny_index, tiny_base, *flags)
    weights = "adapter_model.safetensors"
    assert (out / weights).read_bytes() == (adapter / weights).read_bytes()


def test_traces_of_another_dataset_are_refused(
    other_traces, tiny_dataset, tiny_index, tiny_base, tmp_path, monkeypatch
):
    flags = ("--traces", str(other_traces), "--curriculum", CURRICULUM)
    with pytest.raises(UserError, match=r"this traces was made with dataset \w+…, but dataset \w+… was given"):
        train(tmp_path / "sft", monkeypatch, tiny_dataset, tiny_index, tiny_base, *flags)
    assert not (tmp_path / "sft").exists()


def test_the_filter_marks_traces_and_removes_none(
    adapter, traces, tiny_dataset, tiny_index, tiny_base, tmp_path, monkeypatch
):
    flags = ("--index", str(tiny_index), "--model", str(tiny_base), "--max_tokens", "400")
    out = synthesized(tiny_dataset, tmp_path / "out", monkeypatch, *flags, "--filter_model", str(adapter))
    unfiltered, marked = Traces.load(traces).train, Traces.load(out).train
    assert [replace(trace, gain=None, filtered=None) for trace in marked] == unfiltered
    assert all(trace.filtered == ((trace.gain or 0) > 0) for trace in marked)
    passed = Traces.load(out, arm="filtered").train
    assert 0 < len(passed) < len(marked)
    assert json.loads((out / "report.json").read_text())["filter"]["passed"] == len(passed)


def test_what_is_fed_has_to_fit_together():
    phases = {"a": {"share": 1.0, "reason": 1.0}}
    TaskChoice(curriculum=phases, traces="t").check_tasks()
    TaskChoice(tasks={"seqrec": 1, "reason": 0.5}, traces="t").check_tasks()
    TaskChoice().check_tasks()
    with pytest.raises(UserError, match="tasks and curriculum both say"):
        TaskChoice(tasks={"index2item": 1.0}, curriculum=phases, traces="t").check_tasks()
    with pytest.raises(UserError, match="the task reason is made of reasoning traces: set traces"):
        TaskChoice(curriculum=phases).check_tasks()
    with pytest.raises(UserError, match="traces=t is read by no task"):
        TaskChoice(traces="t").check_tasks()
