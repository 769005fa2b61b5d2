from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonrec.tokenizers.artefact import read_manifest, staged
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.manifest import KINDS, VERSION, Manifest, content_hash, plain
from reasonrec.tokenizers.output import MANIFEST


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    out = tmp_path / "index"
    with staged(out, kind="index", config={"sizes": [4, 4]}, seed=1, inputs={"dataset": "d" * 64}) as (work, facts):
        (work / "index.safetensors").write_bytes(b"codes")
        (work / "health.json").write_text("{}")
        (work / "health.png").write_bytes(b"picture")
        facts["n_items"] = 16
    return out


def written(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    return found


def test_every_key_is_guarded(folder: Path) -> None:
    """Removed, of another type, or of another value: each is one clear line."""
    right = written(folder)
    assert right.keys() == asdict(Manifest("x", {}, 0)).keys()
    others = {str: "other", dict: {"other": "o"}, int: 12}
    for name, value in right.items():
        wrong: list[dict[str, Any]] = [{k: v for k, v in right.items() if k != name}]
        wrong += [right | {name: odd} for odd in (None, [], True, 1.5, [name], others[type(value)])]
        wrong.append(right | {f"{name}_": value})
        for manifest in wrong:
            (folder / MANIFEST).write_text(json.dumps(manifest))
            with pytest.raises(UserError) as refused:
                read_manifest(folder, "index")
            assert "\n" not in str(refused.value)
    (folder / MANIFEST).write_text(json.dumps(right))
    read_manifest(folder, "index")


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["config"].update(sizes=[4, 5]),
        lambda m: m["facts"].update(n_items=17),
        lambda m: m["inputs"].update(dataset="e" * 64),
        lambda m: m.update(seed=2),
        lambda m: m.update(kit_version="9"),
    ],
)
def test_the_seal_covers_everything(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = written(folder)
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest\.json is damaged \(it was changed after it was written\)"):
        read_manifest(folder)


@given(text=st.text())
def test_any_text_is_one_line(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    out = tmp_path_factory.mktemp("any")
    (out / MANIFEST).write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(UserError, match=r"manifest\.json is damaged") as refused:
        read_manifest(out)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"kind": "a", "kind": "b"}', "7" * 10_000, '{"version": 3}', "null"])
def test_odd_json(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        read_manifest(folder)


def test_a_newer_manifest_says_so(folder: Path) -> None:
    (folder / MANIFEST).write_text(json.dumps(written(folder) | {"version": VERSION + 1, "more": 1}))
    with pytest.raises(UserError, match="it has version 3, this kit knows 2: update reasonrec"):
        read_manifest(folder)


def test_an_older_manifest_is_read_with_a_notice(folder: Path) -> None:
    old = written(folder)
    del old["version"], old["seal"]
    (folder / MANIFEST).write_text(json.dumps(old | {"hash": content_hash(old["files"])}))
    with pytest.warns(UserWarning, match="was made by an older version of this kit"):
        manifest = read_manifest(folder, "index")
    assert manifest.hash == content_hash(old["files"]), "what others refer to"
    (folder / "index.safetensors").write_bytes(b"other")
    with pytest.raises(UserError, match="was changed after"):
        read_manifest(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "C:secret", "a\\b", ""])
def test_no_name_leaves_the_folder(folder: Path, name: str, edit_manifest: Callable[..., None]) -> None:
    edit_manifest(folder, lambda manifest: manifest.files.update({name: "0" * 64}))
    with pytest.raises(UserError, match="is not in the folder"):
        read_manifest(folder)


# --- files of a kind -----------------------------------------------------------------------------------------------


def test_a_kind_has_its_files_and_no_others(folder: Path, edit_manifest: Callable[..., None], tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "less")
    edit_manifest(tmp_path / "less", lambda manifest: manifest.files.pop("index.safetensors"))
    with pytest.raises(UserError, match=r"is of kind 'index' and has no index\.safetensors: run the stage"):
        read_manifest(tmp_path / "less")
    edit_manifest(folder, lambda manifest: manifest.files.update({"weights.bin": "0" * 64}))
    with pytest.raises(UserError, match=r"holds weights\.bin, which no artefact of kind 'index' has"):
        read_manifest(folder)


@pytest.mark.parametrize("name", ["training_args.bin", "adapter_model.safetensors", "deep/odd.pt"])
def test_a_file_that_nobody_names_is_refused(folder: Path, name: str) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"x")
    with pytest.raises(UserError, match=rf"{name} was put there after .* was made: remove it"):
        read_manifest(folder)


def test_what_people_and_the_hub_keep_is_no_matter(folder: Path) -> None:
    for name in ("README.md", "notes.html", ".gitattributes", ".cache/huggingface/download.lock", "logs/events.out"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    read_manifest(folder, "index")


def test_a_stage_that_wrote_too_little_or_too_much_leaves_no_artefact(tmp_path: Path) -> None:
    for names, words in ((["a.bin"], "has no index"), (["index.safetensors", "a.bin"], "holds a.bin")):
        with pytest.raises(UserError, match=words), staged(tmp_path / "out", kind="index", config={}) as (work, _):
            for name in names:
                (work / name).write_text("x")
        assert not (tmp_path / "out").exists()


# --- the content hash ------------------------------------------------------------------------------------------------


def test_equal_runs_have_equal_hashes(tmp_path: Path) -> None:
    hashes, seals = set(), set()
    for number in (1, 2):
        with staged(tmp_path / f"run{number}", kind="adapter", config={"output_dir": f"run{number}"}) as (work, facts):
            (work / "adapter_config.json").write_text("{}")
            (work / "adapter_model.safetensors").write_bytes(b"weights")
            (work / "catalogue.parquet").write_bytes(b"items")
            (work / "train_metrics.json").write_text(f'{{"train_runtime": {number}}}')
            facts["modules"] = {f"module{n}" for n in range(20)}
            facts["where"] = tmp_path
        manifest = read_manifest(tmp_path / f"run{number}")
        hashes.add(manifest.hash)
        seals.add(manifest.seal)
        assert manifest.facts["modules"] == sorted(f"module{n}" for n in range(20))
    assert (len(hashes), len(seals)) == (1, 2)
    (tmp_path / "run1" / "train_metrics.json").write_text("{}")
    with pytest.raises(UserError, match=r"train_metrics\.json was changed after"):
        read_manifest(tmp_path / "run1")


def test_facts_belong_to_the_content(tmp_path: Path) -> None:
    hashes = []
    for masked in (True, False):
        out = tmp_path / str(masked)
        with staged(out, kind="notes", config={}) as (_, facts):
            facts["mask_history"] = masked
        hashes.append(read_manifest(out).hash)
    assert hashes[0] != hashes[1]


def test_plain_values() -> None:
    assert plain({"a": {3, 1, 2}, "b": (1, None, True), 4: Path("x")}) == {
        "a": [1, 2, 3],
        "b": [1, None, True],
        "4": "x",
    }


def test_every_kind_of_the_kit_is_known() -> None:
    assert KINDS.keys() == {"dataset", "index", "traces", "adapter", "model", "report", "catalogue", "comparison"}
