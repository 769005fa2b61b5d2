"""What is private is found wherever it stands, and what only looks like it is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from reasonrec.recipes.publishing.scan import scan
from reasonrec.tokenizers.errors import UserError

SECRET = "abcDEF123456789abcDEF123456"


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (f"token: hf_{SECRET}", "a token of the Hub"),
        (f"key=sk-{SECRET}", "an API key"),
        ("-----BEGIN RSA PRIVATE KEY-----", "a private key"),
        ("https://me:word@example.org/x", "a password in an address"),
        ('"dataset": "/data/shop/interactions.csv"', "an absolute path: '/data/shop"),
        ("trained in /srv/runs", "an absolute path: '/srv/runs'"),
        (r"C:\\Users\\me", "a path of Windows"),
        ("~/models/base", "a path below the home folder"),
        ("made on box-17.local yesterday", "the name of this machine"),
        ("the value is correct-horse-battery", "the value of SHOP_API_KEY"),
    ],
)
def test_what_is_private_is_named_with_its_line(
    line: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "box-17.local")
    monkeypatch.setenv("SHOP_API_KEY", "correct-horse-battery")
    (tmp_path / "README.md").write_text(f"# A card\n\n{line}\n")
    with pytest.raises(UserError) as refused:
        scan(tmp_path, {})
    assert str(refused.value).startswith(f"README.md, line 3, holds {what}")
    assert SECRET not in str(refused.value)
    assert "correct-horse" not in str(refused.value)
    (tmp_path / "README.md").unlink()
    with pytest.raises(UserError, match=r"manifest\.json, line 2"):
        scan(tmp_path, {"manifest.json": f"{{\n{line}"})


@pytest.mark.parametrize(
    "line",
    [
        "https://huggingface.co/models and a/b/c, 1/2/3, and/or", "<td>a</td>/b", "~~a~~ and ~5", "../sft or ./sft",
        "you/my-recommender", "sk-learn, hf_hub", "kettle: 3", "[a](docs/b.md)", "HR@10 [−.25, +.00] / 2",
    ],
)  # fmt: skip
def test_what_only_looks_like_it_passes(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "model")
    (tmp_path / "README.md").write_text(f"a model\n{line}\n")
    scan(tmp_path, {})


def test_of_a_tokenizer_only_secrets_and_the_home_folder_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/lives/somebody")
    file = tmp_path / "tokenizer_config.json"
    file.write_text('{"chat_template": "/think/a"}')
    scan(tmp_path, {})
    file.write_text('{"name_or_path": "/lives/somebody/base"}')
    with pytest.raises(UserError, match=r"tokenizer_config\.json, line 1, holds a path below the home folder"):
        scan(tmp_path, {})
