"""The line that a stage ends with."""

import json
import shlex
import sys
from pathlib import Path

import pytest

from reasonrec.recipes import cli, index_items, prepare, serve, sft
from reasonrec.recipes.args import parse, run
from reasonrec.recipes.next_stage import next_commands
from reasonrec.recipes.trainers.keys import inherited

KEYS = {"index": [index_items.IndexConfig], "sft": [sft.SftStage, inherited("sft")], "serve": [serve.ServeConfig]}


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    files = {
        "sft": "dataset: runs/dataset\nindex: runs/index\nmodel: some/base\noutput_dir: runs/sft\n",
        "synthesize": "dataset: runs/dataset\nindex: runs/index\noutput_dir: runs/traces\n",
        "reason": "dataset: runs/dataset\ntraces: runs/traces\nmodel: runs/sft\noutput_dir: runs/reason\n",
        "eval": "dataset: runs/dataset\nmodels: [runs/sft, runs/reason]\noutput_dir: runs/report\n",
    }
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(f"# accelerate launch recipes/{name}.py --config {name}.yaml\n{text}")
    (tmp_path / "notes.yaml").write_text("- dataset: runs/dataset\n")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    return tmp_path


def made(name: str, kind: str = "dataset", **config: str) -> Path:
    """As much of an artefact as is read here."""
    out = Path("runs", name)
    out.mkdir(parents=True)
    (out / "manifest.json").write_text(json.dumps({"kind": kind, "config": config}))
    return out


def test_the_recipe_goes_on_where_its_inputs_are(recipe: Path) -> None:
    argv = ["--config", "index.yaml"]
    made("dataset")
    index = made("index", "index", dataset="../dataset")
    launches = [f"accelerate launch recipes/{name}.py --config {name}.yaml" for name in ("sft", "synthesize")]
    assert next_commands(index, argv) == launches
    model = made("sft", "adapter")
    assert next_commands(index, argv) == launches[1:]  # what has been written is not asked for again
    assert next_commands(model, argv) == ["reasonrec serve --model runs/sft"]  # reason has no traces, eval no reason
    traces = made("traces", "traces")
    assert next_commands(traces, argv) == ["accelerate launch recipes/reason.py --config reason.yaml"]
    made("reason", "adapter")
    assert next_commands(model, argv) == ["accelerate launch recipes/eval.py --config eval.yaml"]
    assert next_commands(made("report", "report"), argv) == []


def test_without_a_recipe_a_command_fits_the_artefact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    named = [
        *next_commands(made("my dataset"), []),
        *next_commands(made("index", "index", dataset="../my dataset"), ["--seed", "1"]),
        *next_commands(made("sft", "adapter"), []),
    ]
    for command in named:  # every one is taken by its stage
        program, name, *words = shlex.split(command)
        assert program == "reasonrec"
        assert name in cli.STAGES
        parse(KEYS[name], words)
    assert "--dataset 'runs/my dataset'" in named[0]
    assert "--dataset 'runs/my dataset'" in named[1]


def test_a_stage_ends_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--source", "synthetic", "--output_dir", "out/dataset"]
    monkeypatch.setattr(sys, "argv", ["prepare.py", *words])
    run(prepare.main)()
    assert capsys.readouterr().out.splitlines()[-1] == (
        "next: reasonrec index --dataset out/dataset --output_dir out/index"
    )
