"""A push and a load through the Hub's HTTP interface, each in a process of its own, as `HF_ENDPOINT` is read once."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from reasonrec.recipes.recommender import Recommender
from reasonrec.tokenizers.artefact import file_hash, read_manifest

RECIPES = Path(__file__).parents[2] / "recipes"
_spec = importlib.util.spec_from_file_location("hub_server", Path(__file__).with_name("hub_server.py"))
assert _spec is not None
assert _spec.loader is not None
hub_server = importlib.util.module_from_spec(_spec)
sys.modules["hub_server"] = hub_server  # its dataclasses look there
_spec.loader.exec_module(hub_server)

BASE, REPOSITORY = "you/tiny-base", "you/next-item"
LOAD = """
import json, sys
from reasonrec.recipes.recommender import Recommender
from reasonrec.tokenizers.errors import UserError

repository, revision, push = json.loads(sys.argv[1])
try:
    recommender = Recommender.from_pretrained(repository, revision=revision, dtype="fp32", device="cpu")
except UserError as error:
    print(json.dumps({"error": str(error)}))
    raise SystemExit
found = recommender.recommend(recommender.policy.catalogue.item_ids[:3], k=5)
pushed = recommender.push_to_hub(repository, titles=False) if push else None
print(json.dumps({"items": [vars(item) for item in found], "base": recommender.setting.base_model, "pushed": pushed}))
"""
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def hub(tiny_base: Path) -> Iterator[Any]:
    with hub_server.serving() as found:
        found.put_folder(BASE, tiny_base)
        found.commit(REPOSITORY, {".gitattributes": b"", "adapter_model.bin": b"of an earlier one"})
        yield found


@pytest.fixture(scope="module")
def run(hub: Any, tmp_path_factory: pytest.TempPathFactory) -> Run:
    home = tmp_path_factory.mktemp("hub_home")

    def launch(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
        # The kit knows no other way of uploading than the library's; Xet's servers are not part of the stand-in.
        fixed = {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_TOKEN": hub_server.TOKEN, "HF_HUB_OFFLINE": "0",
                 "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}  # fmt: skip
        environment = {**os.environ, **fixed, **more}
        return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=False)

    return launch


@pytest.fixture(scope="module")
def load(run: Run) -> Callable[..., dict[str, Any]]:
    def launch(repository: str, revision: str | None = None, *, push: bool = False, **more: str) -> dict[str, Any]:
        done = run("-c", LOAD, json.dumps([repository, revision, push]), **more)
        assert done.returncode == 0, done.stderr[-3000:]
        return dict(json.loads(done.stdout.splitlines()[-1]))

    return launch


@pytest.fixture(scope="module")
def pushed(run: Run, hub: Any, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The commit of what the stage pushed."""
    out = tmp_path_factory.mktemp("pushed") / "folder"
    flags = ["--model", str(adapter), "--base_model", BASE, "--repository", REPOSITORY, "--output_dir", str(out)]
    done = run(str(RECIPES / "publish.py"), *flags)
    assert done.returncode == 0, done.stderr
    oid, files = hub.commits[REPOSITORY][-1]
    assert f"published: {hub.address}/{REPOSITORY}/commit/{oid}" in done.stdout
    assert len(hub.commits[REPOSITORY]) == 2, "one commit, whole or not at all"
    assert files.keys() == {".gitattributes", *(path.name for path in out.iterdir())}
    manifest = read_manifest(out)
    assert manifest.config["base_model"] == BASE
    assert manifest.config["base_revision"] == hub.commits[BASE][-1][0]
    card = files["README.md"].decode()
    assert f"base_model: {BASE}" in card
    assert f"revision `{manifest.config['base_revision']}`" in card
    assert hub_server.TOKEN not in b"".join(files.values()).decode("latin-1")
    return str(oid)


def test_it_is_loaded_in_one_line_and_pushed_again(
    pushed: str, hub: Any, load: Callable[..., dict[str, Any]], adapter: Path
) -> None:
    here = Recommender.from_pretrained(adapter, dtype="fp32", device="cpu")
    expected = [vars(item) for item in here.recommend(here.policy.catalogue.item_ids[:3], k=5)]
    found = load(REPOSITORY, push=True)
    assert found["items"] == expected
    assert found["base"] == BASE
    oid = hub.commits[REPOSITORY][-1][0]
    assert oid != pushed
    assert found["pushed"] == f"{hub.address}/{REPOSITORY}/commit/{oid}"
    assert [item["title"] for item in load(REPOSITORY)["items"]] == [item["id"] for item in expected]
    assert load(REPOSITORY, pushed, HF_HUB_OFFLINE="1")["items"] == expected, "a commit that the cache has"


def test_what_the_hub_does_not_give_is_said(
    pushed: str, hub: Any, load: Callable[..., dict[str, Any]], run: Run, adapter: Path, tmp_path: Path
) -> None:
    assert f"asked: {hub.address}" in load("you/nothing")["error"]
    assert "in revision 'v9'" in load(REPOSITORY, "v9")["error"]
    files = dict(hub.at(REPOSITORY, pushed)[1])
    hub.commit("you/altered", files | {"catalogue.parquet": files["catalogue.parquet"] + b"!"})
    expected = file_hash(adapter / "catalogue.parquet")
    assert expected[:12] in (error := load("you/altered")["error"])
    assert "catalogue.parquet was changed" in error
    flags = ["--model", str(adapter), "--base_model", BASE, "--repository", "you/mine", "--output_dir"]
    done = run(str(RECIPES / "publish.py"), *flags, str(tmp_path / "out"), HF_TOKEN="")
    assert done.returncode == 2
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "you/mine cannot be written" in line
    assert "401" in line
    assert "you/mine" not in hub.commits


def test_another_revision_of_the_base_is_refused_with_both(
    pushed: str, hub: Any, load: Callable[..., dict[str, Any]], tiny_base: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "base")
    weights = (tmp_path / "base" / "model.safetensors").read_bytes()
    first, files = hub.commits[BASE][-1]
    hub.commit(BASE, files | {"model.safetensors": weights})
    error = load(REPOSITORY, pushed)["error"]
    hub.commits[BASE].pop()
    assert first in error
    assert f"({BASE})" in error
    assert "but the base loaded now has" in error
