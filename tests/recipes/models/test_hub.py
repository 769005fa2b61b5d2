"""Names of the Hub, and what is said where it gives nothing; what it gives is tested in `test_publish.py`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from reasonrec.recipes.models.hub import is_repository, local_folder, push
from reasonrec.recipes.recommender import Recommender
from reasonrec.tokenizers.artefact import file_hash, read_manifest
from reasonrec.tokenizers.errors import UserError


def test_a_folder_that_is_here_is_no_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "sft").mkdir(parents=True)
    assert not is_repository("runs/sft")
    assert is_repository("you/my-recommender")
    for name in ("sft", "/sft", "runs/demo/sft", "../sft", "you/", "a b/c"):
        assert not is_repository(name)
    assert local_folder("runs/sft") == Path("runs/sft")
    with pytest.raises(UserError, match=r"revision='main' is for a repository on the Hub, and runs/sft is a folder"):
        local_folder("runs/sft", "main")


def test_a_hub_that_gives_nothing_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        Recommender.from_pretrained("you/my-recommender", revision="v2")
    said = str(refused.value)
    for words in (
        f"you/my-recommender is no folder here ({tmp_path / 'you' / 'my-recommender'})",
        "in revision 'v2'",
        "asked: https://huggingface.co",
        "HF_HUB_OFFLINE is set",
    ):
        assert words in said
    assert "\n" not in said
    with pytest.raises(UserError, match=r"you/my-recommender cannot be written .*HF_HUB_OFFLINE is set"):
        push(tmp_path, "you/my-recommender")
    with pytest.raises(UserError, match=r"repository='me' has to be a name on the Hub, such as you/"):
        push(tmp_path, "me")


def test_a_missing_or_altered_file_is_named_with_its_hash(adapter: Path, tmp_path: Path) -> None:
    expected = read_manifest(adapter).files["catalogue.parquet"]
    shutil.copytree(adapter, tmp_path / "altered")
    file = tmp_path / "altered" / "catalogue.parquet"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(UserError, match=rf"catalogue\.parquet was changed .*{file_hash(file)[:12]}.*{expected[:12]}"):
        Recommender.from_pretrained(tmp_path / "altered")
    file.unlink()
    with pytest.raises(UserError, match=rf"catalogue\.parquet is missing.*{expected[:12]}"):
        Recommender.from_pretrained(tmp_path / "altered")
