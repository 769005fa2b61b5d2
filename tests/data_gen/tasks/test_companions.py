"""Items beside items: who stands beside whom, by hand, and what an example of it looks like."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import AutoTokenizer

from reasonrec.data_gen.tasks.prompts import Prompter, Prompts
from reasonrec.data_gen.tasks.render import Examples, Material, companions, task_names, tasks
from reasonrec.tokenizers.vocabulary import Vocabulary

ITEM2ITEM = task_names().index("item2item")
CODES = np.array([[0, 0, -1], [0, 1, 0], [0, 1, 1], [1, 0, -1], [1, 1, -1]])
SEQUENCES = [np.array([0, 1, 2]), np.array([0, 1, 1]), np.array([3]), np.array([4, 2, 0, 1])]


def examples_of(base, *, one_per_prefix: bool) -> Examples:
    tokenizer = AutoTokenizer.from_pretrained(base)
    vocabulary = Vocabulary.extend(tokenizer, (2, 2, 2))
    ids = vocabulary.item_token_ids(CODES)
    prompts = Prompts(Prompter(tokenizer), "History:{history}", ids, vocabulary.begin_id, tokenizer.eos_token_id)
    return Examples(prompts, SEQUENCES, ["title"] * 5, [""] * 5, one_per_prefix)


def test_companions_by_hand():
    found = companions(SEQUENCES[:3], 5, set_order=False)
    # Pairs 0-1: 1 + 1 + 1/2, 0-2: 1/2, 1-2: 1; counts 2, 3, 1.
    assert found[0][0].tolist() == [1, 2]
    strength = np.array([2.5 / np.sqrt(6), 0.5 / np.sqrt(2)])
    np.testing.assert_allclose(found[0][1], strength / strength.sum())
    assert [len(items) for items, _ in found] == [2, 2, 2, 0, 0]
    sets = companions([np.array([0, 1, 2]), np.array([0, 3])], 4, set_order=True)
    assert sets[0][0].tolist() == [3, 1, 2], "two share a unit, one has it alone"


def test_items_that_stand_alone_are_no_examples():
    material = Material(SEQUENCES, np.full(5, 2))
    window = type("Window", (), {"max_history": 4, "one_per_prefix": False})()
    source, _, stop, _ = tasks()["item2item"].draw(material, window, 40, np.random.default_rng(0))
    assert set(source.tolist()) == {0, 1, 2, 4}
    assert set(stop.tolist()) == {4}, "no more than a history holds"


@pytest.mark.parametrize("one_per_prefix", [False, True])
def test_an_item_is_followed_by_its_companions(tiny_base, one_per_prefix):
    examples = examples_of(tiny_base, one_per_prefix=one_per_prefix)
    codes, begin = examples.prompts.item_token_ids, len(examples.prompts.direct_parts()[0])
    seen = set()
    for item in (0, 1, 2, 4):
        others = {tuple(codes[other]): int(other) for other in examples.companions[item][0]}
        for variant in range(4):
            line = (ITEM2ITEM, item, 0, 3, -1, variant)
            ids, labels = examples.render(*line)
            assert ids[begin : begin + len(codes[item])] == codes[item]
            assert set(labels[: begin + len(codes[item])]) == {-100}, "the first item is given"
            word, named = (), []
            for token in (label for label in labels if label != -100):
                word += (token,)
                if word in others:
                    named.append(others[word])
                    word = ()
            assert not word
            assert len(named) == len(set(named)) == (1 if one_per_prefix else min(3, len(others)))
            seen.add((item, *named))
            assert examples.render(*line) == (ids, labels)
    assert len(seen) > 4, "variants draw others"
