"""Code tokens: ordinary, one id each, consecutive, and of one index only."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import AutoTokenizer

from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.vocabulary import BEGIN, Vocabulary, code_token

SIZES = (3, 2, 2)


@pytest.fixture
def tokenizer(tiny_base):
    return AutoTokenizer.from_pretrained(tiny_base)


def all_tokens(sizes):
    return [BEGIN, *(code_token(level, code) for level, size in enumerate(sizes) for code in range(size))]


def test_tokens_look_as_documented():
    assert code_token(0, 12) == "<|a_12|>"
    assert code_token(2, 0) == "<|c_0|>"


def test_ids_are_consecutive_and_new(tokenizer):
    before = len(tokenizer)
    vocabulary = Vocabulary.extend(tokenizer, SIZES)
    assert tokenizer.convert_tokens_to_ids(all_tokens(SIZES)) == vocabulary.token_ids
    assert vocabulary.token_ids == list(range(before, before + 8))
    assert (vocabulary.begin_id, vocabulary.first_id) == (before, before + 1)
    assert (vocabulary.n_columns, vocabulary.size) == (7, before + 8)
    assert len(tokenizer) == vocabulary.size


def test_tokens_are_ordinary_so_rewards_still_see_them(tokenizer):
    vocabulary = Vocabulary.extend(tokenizer, SIZES)
    assert not set(vocabulary.token_ids) & set(tokenizer.all_special_ids)
    for token_id, name in zip(vocabulary.token_ids, all_tokens(SIZES), strict=True):
        ids = [token_id, tokenizer.eos_token_id]
        assert tokenizer.decode(ids, skip_special_tokens=True) == name
        assert not tokenizer.added_tokens_decoder[token_id].special


def test_each_token_is_one_id_wherever_it_stands(tokenizer):
    vocabulary = Vocabulary.extend(tokenizer, SIZES)
    first, second = vocabulary.first_id, vocabulary.first_id + 4  # a_0, b_1
    x, y = (tokenizer(word, add_special_tokens=False)["input_ids"] for word in "xy")
    assert tokenizer("x<|a_0|><|b_1|>y", add_special_tokens=False)["input_ids"] == [*x, first, second, *y]
    for name, token_id in zip(all_tokens(SIZES), vocabulary.token_ids, strict=True):
        for text in (name, f"x{name}y", f" {name} ", f"Item:{name}\n", f"{name}{name}"):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert ids.count(token_id) == text.count(name)
            assert not (set(ids) & set(vocabulary.token_ids)) - {token_id}
            assert tokenizer.decode(ids) == text


def test_extending_again_finds_the_same_tokens(tokenizer, tmp_path):
    vocabulary = Vocabulary.extend(tokenizer, SIZES)
    assert Vocabulary.extend(tokenizer, SIZES) == vocabulary
    assert len(tokenizer) == vocabulary.size
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    assert Vocabulary.extend(reloaded, list(SIZES)) == vocabulary
    assert len(reloaded) == vocabulary.size
    text = "x<|item|><|a_0|><|b_1|>y"
    assert reloaded(text)["input_ids"] == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("other", [(4, 2, 2), (3, 2, 3), (3, 3, 2), (2, 2, 2), (3, 2), (3,), (3, 2, 2, 1), (3, 2, 1)])
def test_tokens_of_another_index_are_refused(tokenizer, other):
    Vocabulary.extend(tokenizer, SIZES)
    with pytest.raises(UserError, match=r"another index.*original tokenizer"):
        Vocabulary.extend(tokenizer, other)


def test_a_level_without_codes_has_no_tokens(tokenizer):
    before = len(tokenizer)
    assert Vocabulary.extend(tokenizer, (3, 0)).size == before + 4
    assert Vocabulary.extend(tokenizer, (3, 0)).n_columns == 3


def test_item_token_ids_by_hand():
    vocabulary = Vocabulary((3, 2, 2), begin_id=100)
    codes = np.array([[2, 0, -1], [0, 1, 1]], dtype=np.int32)
    assert vocabulary.item_token_ids(codes) == [[103, 104], [101, 105, 107]]
