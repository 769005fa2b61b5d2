"""The card of a trained model: valid on the Hub, silent about this machine, and its snippets run."""

from __future__ import annotations

import ast
import getpass
import re
import socket
from copy import copy
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from reasonrec.recipes.decoding.prefix import padded
from reasonrec.recipes.models.card import as_code, as_text, write_card
from reasonrec.recipes.recommender import Recommender

FOLDER = "path/to/this/folder"


def snippets(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)


@pytest.fixture
def card(adapter: Path) -> str:
    return (adapter / "README.md").read_text(encoding="utf-8")


def test_its_front_matter_is_valid(adapter: Path, card: str) -> None:
    data = ModelCard.load(adapter / "README.md").data
    assert data.library_name == "peft"
    assert "reasonrec" in data.tags
    assert data.base_model is None, "a local base model has no page on the Hub"
    assert "| items, users | 48, 180 |" in card
    assert "| item codes | 4 × 6, 6 to tell equal ones apart |" in card
    assert "| longest history | 6 items |" in card


def test_it_tells_nothing_about_this_machine(card: str, adapter: Path, tiny_base: Path) -> None:
    for private in (str(adapter.parent), str(tiny_base.parent), str(Path.home()), socket.gethostname()):
        assert private not in card
    assert not re.search(r"(?<![\w.:/])/\w+/", card), "an absolute path"
    user = getpass.getuser()
    assert not re.search(rf"\b{re.escape(user)}\b", card)


def test_the_snippet_for_the_kit_runs(card: str, adapter: Path) -> None:
    (code,) = (code for code in snippets(card) if "Recommender" in code)
    names: dict[str, object] = {}
    exec(code.replace(FOLDER, str(adapter)), names)
    items = names["items"]
    assert isinstance(items, np.ndarray)
    assert items.shape == (1, 10)
    assert len(set(items[0])) == 10


def test_the_snippet_for_plain_peft_gives_the_same_model(card: str, adapter: Path, tiny_base: Path) -> None:
    (code,) = (code for code in snippets(card) if "PeftModel" in code)
    names: dict[str, object] = {}
    exec(code.replace(FOLDER, str(adapter)).replace("path/to/the/base/model", str(tiny_base)), names)
    plain = names["model"]
    assert isinstance(plain, torch.nn.Module)
    ours = Recommender.from_pretrained(adapter, dtype=torch.float32)
    ids, mask = padded(ours.prompts([[3, 14, 15]]), ours.policy.pad_id, ours.model.device)
    with torch.no_grad():
        expected = ours.model(input_ids=ids, attention_mask=mask).logits
        actual = plain.float().eval()(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_base_of_the_hub_is_linked_and_a_whole_model_needs_none(adapter: Path, tmp_path: Path) -> None:
    ours = Recommender.from_pretrained(adapter)
    setting = replace(ours.setting, base_model="someone/small-model")
    write_card(tmp_path, setting, ours.policy, {"train_loss": 1.25})
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "someone/small-model"
    assert 'from_pretrained("someone/small-model")' in card.text
    assert "| training loss | 1.250 |" in card.text
    write_card(tmp_path, replace(setting, method="full", base_model="package:tiny_model"), ours.policy, {})
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.base_model is None
    assert "tiny_model learned 48 items" in card.text
    assert "PeftModel" not in card.text


EVIL = "x](javascript:alert(1)) <script>alert(2)</script> | `` ![a](b) https://a.b www.a.b a@b.c &lt; __d__ \x1b[2J"
TAGS = {"h1", "p", "table", "thead", "tbody", "tr", "th", "td", "code", "pre"}


def rendered(markdown: str) -> str:
    return str(MarkdownIt("gfm-like", {"linkify": False, "html": True}).render(markdown))


def plain(html: str) -> str:
    return unescape(re.sub(r"</?p>\n?", "", html))


@pytest.mark.parametrize(
    "text",
    [
        EVIL, "- a", "1. a", "2) a", "# a #", "> a", "===", "---", "***", "_a_ b_c _", "~~a~~", "&copy;", "a\\",
        "[a]: b",        "<!-- a", "`", "|", "$a$", ":tada:", "@someone", "[^1]", "<https://a.b>",
    ],
)  # fmt: skip
def test_a_name_of_others_is_shown_as_it_is(text: str) -> None:
    expected = text.replace("\x1b", r"\x1b")
    assert plain(rendered(as_text(text))) == expected
    assert unescape(rendered(f"# For {as_text(text)}")) == f"<h1>For {expected}</h1>\n"


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",)) | st.sampled_from("\\`*_[]()<>#|~!-+=.:&@$\n")))
def test_any_name_is_text_and_any_prompt_is_one_cell_of_code(text: str) -> None:
    assert not set(re.findall(r"<(\w+)", rendered(as_text(text)))) - {"p"}
    cells = rendered(f"| a | b |\n|---|---|\n| prompt | {as_code(text)} |\n| c | d |\n")
    assert cells.count("<td>") == 4
    assert cells.count("<code>") == 1


def test_a_card_of_hostile_names_is_still_a_card(adapter: Path, tmp_path: Path) -> None:
    ours = Recommender.from_pretrained(adapter)
    catalogue = replace(ours.policy.catalogue, name=f"---\nlicense: mine\n---\n{EVIL}")
    hostile = copy(ours.policy)
    hostile.catalogue = catalogue
    setting = replace(ours.setting, base_model='x"\nlicense: mine\n---\n```\n<script>')
    write_card(tmp_path, setting, hostile, {})
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == setting.base_model
    assert card.data.license is None
    page = rendered(card.text)
    assert not set(re.findall(r"<(\w+)", page)) - TAGS
    assert page.count("<pre>") == 2
    assert "<h1>A generative recommender for --- license: mine --- x](javascript:alert(1)) &lt;script&gt;" in page
    for code in re.findall(r"<pre><code.*?>(.*?)</code></pre>", page, flags=re.DOTALL):
        ast.parse(unescape(code))
