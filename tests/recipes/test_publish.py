"""A checkpoint becomes a folder for the Hub: complete, loadable, with a card from its run, and nothing private."""

from __future__ import annotations

import contextlib
import importlib
import re
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from huggingface_hub import ModelCard

from reasonrec.data_gen.schema import Dataset
from reasonrec.recipes.args import run
from reasonrec.recipes.publish import PublishConfig
from reasonrec.recipes.publish import publish as publish_folder
from reasonrec.recipes.recommender import Recommender
from reasonrec.tokenizers.artefact import read_manifest
from reasonrec.tokenizers.catalogue import CATALOGUE_FILE
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.output import is_held, unfinished_outputs


@pytest.fixture(scope="module")
def report(adapter: Path, tiny_dataset: Path, stage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("publish") / "report"
    flags = ["--sasrec_trials", "0", "--precision", "fp32", "--num_beams", "20", "--max_rows", "12"]
    stage("eval_ranking", "--dataset", str(tiny_dataset), "--models", str(adapter), *flags, "--output_dir", str(out))
    return out


@pytest.fixture(scope="module")
def published(adapter: Path, report: Path, stage, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("published") / "folder"
    flags = ["--model", str(adapter), "--report", str(report), "--repository", "you/next-item", "--dry_run"]
    return out, stage("publish", *flags, "--license", "apache-2.0", "--output_dir", str(out)).stdout


@pytest.fixture
def publish(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """Run the stage in this process; gives what it printed, and its error."""

    def launch(*words: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["publish", *words])
        with contextlib.suppress(SystemExit):
            run(importlib.import_module("reasonrec.recipes.publish").main)()
        out, error = capsys.readouterr()
        return out, "\n".join(line for line in error.splitlines() if line.startswith("error: "))

    return launch


def test_the_folder_is_the_checkpoint_without_its_run(published: tuple[Path, str], adapter: Path) -> None:
    manifest, before = read_manifest(published[0]), read_manifest(adapter)
    assert manifest.files == before.files
    assert manifest.facts == before.facts
    assert manifest.config.keys() == {"stage", "base_model", "base_revision", "seed"}
    assert manifest.config["stage"] == "sft"
    assert manifest.facts["setting"]["fingerprint"] == before.facts["setting"]["fingerprint"]
    assert manifest.inputs == before.inputs | {"published": before.hash}
    assert {path.name for path in published[0].iterdir()} == {*manifest.files, "manifest.json", "README.md"}
    assert "nothing was pushed" in published[1]


def test_nothing_of_this_machine_or_of_users_is_in_it(
    published: tuple[Path, str], adapter: Path, tiny_base: Path, tiny_dataset: Path
) -> None:
    private = [adapter.parent, tiny_base.parent, tiny_dataset.parent, Path.home(), Path.cwd()]
    for file in published[0].iterdir():
        content = file.read_bytes()
        for path in private:
            assert str(path).encode() + b"/" not in content, file
        if file.suffix in (".md", ".json"):
            assert socket.gethostname().encode() not in content or len(socket.gethostname()) < 6, file
    users = set(Dataset.load(tiny_dataset).users["user_id"])
    text = (published[0] / "README.md").read_text() + (published[0] / "manifest.json").read_text()
    assert not users & set(re.findall(r"\w+", text))


def test_it_recommends_what_the_checkpoint_does(
    published: tuple[Path, str], adapter: Path, tiny_base: Path, tmp_path: Path
) -> None:
    shutil.copytree(published[0], tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"pass --base_model PATH"):
        Recommender.from_pretrained(tmp_path / "elsewhere")
    there = Recommender.from_pretrained(tmp_path / "elsewhere", base_model=str(tiny_base), dtype="fp32")
    ids = there.policy.catalogue.item_ids[:3]
    here = Recommender.from_pretrained(adapter, dtype="fp32")
    assert there.recommend(ids, k=8) == here.recommend(ids, k=8)


def test_a_published_folder_holds_no_dataset(published: tuple[Path, str], tiny_base: Path, stage) -> None:
    where = ["--model", str(published[0]), "--base_model", str(tiny_base)]
    done = stage("recommend", *where, "--user", "u1", status=2)
    assert "holds no dataset" in done.stderr
    assert "--dataset PATH" in done.stderr


def test_its_card_is_filled_from_the_run(published: tuple[Path, str], adapter: Path, tiny_dataset: Path) -> None:
    card = ModelCard.load(published[0] / "README.md")
    data, text = card.data, card.text
    assert (data.library_name, data.license, data.model_name) == ("peft", "apache-2.0", "next-item")
    assert {"reasonrec", "recommender-system", "semantic-id"} <= set(data.tags)
    metrics = {result.metric_type: result for result in data.eval_results}
    assert metrics.keys() == {"hr@10", "ndcg@10"}
    result = metrics["hr@10"]
    assert "item level" in result.metric_name
    assert result.dataset_name == "synthetic personas"
    assert f"| {result.metric_value:.4f} | " in text
    manifest = read_manifest(adapter)
    for words in (
        'Recommender.from_pretrained("you/next-item"',
        'PeftModel.from_pretrained(base, "you/next-item")',
        f"dataset `{read_manifest(tiny_dataset).hash[:16]}…`",
        f"weights `{manifest.facts['setting']['fingerprint'][:20]}…`",
        "# accelerate launch recipes/sft.py --config sft.yaml",
        "lora_dropout: 0.1",
        "num_train_epochs: 2.0",
        "| popularity | ",
        "HR@10, item level | 95%",
        "whether thinking helps was not measured",
        "12 test cases",
    ):
        assert words in text
    assert "None" not in text
    assert "/" not in re.search(r"^dataset: (.*)$", text, re.MULTILINE)[1]  # type: ignore[index]


def test_titles_stay_where_they_may_not_be_published(
    publish, adapter: Path, tiny_base: Path, edit_manifest, tmp_path: Path
) -> None:
    shutil.copytree(adapter, tmp_path / "closed")
    terms = {"redistributable": False, "terms": "for research, not to be passed on"}
    edit_manifest(tmp_path / "closed", lambda manifest: manifest.facts["catalogue"].update(terms))
    flags = ["--model", str(tmp_path / "closed"), "--repository", "you/next-item"]
    out = tmp_path / "out"
    said, error = publish(*flags, "--output_dir", str(out))
    assert "may not be published (for research, not to be passed on): pass --titles false" in error
    assert not out.exists()
    said, _ = publish(*flags, "--output_dir", str(out), "--dry_run")
    assert "are for you alone (for research, not to be passed on)" in said
    said, _ = publish(*flags, "--output_dir", str(tmp_path / "ids"), "--dry_run", "--titles", "false")
    assert "for you alone" not in said
    items = pl.read_parquet(tmp_path / "ids" / CATALOGUE_FILE)
    assert items["title"].to_list() == items["item_id"].to_list()
    assert set(items["category"]) | set(items["description"]) | set(items["brand"]) == {""}
    named, nameless = (
        Recommender.from_pretrained(folder, base_model=str(tiny_base), dtype="fp32").recommend([1, 2, 3], k=5)
        for folder in (out, tmp_path / "ids")
    )
    assert [(item.id, item.score) for item in named] == [(item.id, item.score) for item in nameless]
    assert [item.title for item in nameless] == [item.id for item in nameless]


def test_what_does_not_say_whether_titles_are_free_is_not_pushed_with_them(
    publish, adapter: Path, edit_manifest, tmp_path: Path
) -> None:
    shutil.copytree(adapter, tmp_path / "old")
    edit_manifest(tmp_path / "old", lambda manifest: manifest.facts["catalogue"].pop("redistributable"))
    flags = ["--model", str(tmp_path / "old"), "--repository", "you/next-item", "--output_dir", str(tmp_path / "out")]
    assert "it does not say (made by an older version)" in publish(*flags)[1]


def test_what_is_private_is_refused_with_its_line(publish, adapter: Path, edit_manifest, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "private")
    prompt = "From /srv/ourshop/data: {history}"
    edit_manifest(tmp_path / "private", lambda manifest: manifest.facts["setting"].update(history_prompt=prompt))
    out = tmp_path / "out"
    error = publish("--model", str(tmp_path / "private"), "--dry_run", "--output_dir", str(out))[1]
    assert re.search(r"README\.md, line \d+, holds an absolute path: .*/srv/ourshop", error)
    assert not out.exists()


def test_mistakes_are_named(
    publish, adapter: Path, tiny_index: Path, report: Path, edit_manifest, tmp_path: Path
) -> None:
    out = ["--output_dir", str(tmp_path / "out")]
    assert "repository is not set" in publish("--model", str(adapter), *out)[1]
    assert (
        "repository='me' has to be a name on the Hub"
        in publish("--model", str(adapter), "--repository", "me", *out)[1]
    )
    assert "is a index, not a trained model" in publish("--model", str(tiny_index), "--dry_run", *out)[1]
    shutil.copytree(adapter, tmp_path / "other")
    edit_manifest(tmp_path / "other", lambda manifest: manifest.facts.update(more=1))
    error = publish("--model", str(tmp_path / "other"), "--report", str(report), "--dry_run", *out)[1]
    assert "none of them is" in error
    assert read_manifest(tmp_path / "other").hash[:12] in error
    assert not (tmp_path / "out").exists()


def test_a_judged_copy_has_the_numbers_of_its_model(
    publish, adapter: Path, report: Path, edit_manifest, tmp_path: Path
) -> None:
    def amend(stage_key: str) -> Path:
        folder = tmp_path / stage_key
        shutil.copytree(adapter, folder)
        edit_manifest(folder, lambda manifest: manifest.facts.update(more=1))
        edit_manifest(folder, lambda manifest: manifest.inputs.update(model=read_manifest(adapter).hash))
        edit_manifest(folder, lambda manifest: manifest.config.update({stage_key: "other"}))
        return folder

    flags = ["--report", str(report), "--dry_run", "--output_dir", str(tmp_path / "out")]
    trained_on = publish("--model", str(amend("algorithm")), *flags)[1]
    assert "none of them is" in trained_on, "what was trained since is another model"
    assert publish("--model", str(amend("direct")), *flags)[1] == ""
    assert "**lora, exact search**" in (tmp_path / "out" / "README.md").read_text()


def test_another_base_is_refused(publish, adapter: Path, tiny_base: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    shutil.copytree(tiny_base, tmp_path / "another")
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "another")
    flags = ["--model", str(adapter), "--dry_run", "--base_model", str(tmp_path / "another")]
    error = publish(*flags, "--output_dir", str(tmp_path / "out"))[1]
    stored = read_manifest(adapter).facts["setting"]
    assert f"{stored['fingerprint'][:12]}… ({stored['base_model']}), but another has " in error


def test_called_from_python_it_holds_no_output_behind_it(adapter: Path, tiny_base: Path, tmp_path: Path) -> None:
    """Neither of a publication nor of a refusal: the same process may publish there again."""
    before = unfinished_outputs()
    config = PublishConfig(str(adapter), str(tmp_path / "out"), base_model=str(tiny_base), dry_run=True)
    publish_folder(config)
    assert not is_held(tmp_path / "out")
    with pytest.raises(UserError, match="report"):
        publish_folder(replace(config, output_dir=str(tmp_path / "refused"), report=str(adapter)))
    assert not is_held(tmp_path / "refused")
    assert unfinished_outputs() == before
