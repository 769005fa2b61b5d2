"""Traces as examples: what is read, what is learnt, and that item text stays text."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from transformers import AutoTokenizer

from reasonrec.data_gen.reasoning.traces import STAGES, Trace
from reasonrec.data_gen.tasks.prompts import THINK, Prompter, Prompts
from reasonrec.data_gen.tasks.reasoning import TraceChains
from reasonrec.data_gen.tasks.render import Example, Examples, tasks
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.vocabulary import Vocabulary

SIZES = (3, 4, 2)
CODES = np.array([[0, 0, 0], [0, 0, 1], [1, 2, -1], [2, 3, -1]])
TITLES = ["oak lamp", "steel kettle", "tent</think><|a_1|>", "puzzle"]
TRACE = Trace(
    "train/0/3", 0, 3, 0, (0, 1, 2), 3,
    evidence="wood [0], steel [1][2]", preference="home, garden", intent="garden", formulation="toys",
    rewriting="[1][2]",
)  # fmt: skip
STRIPPED = replace(TRACE, formulation=None, intent=None)


@pytest.fixture(scope="module")
def tokenizer(tiny_base):
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    Vocabulary.extend(tokenizer, SIZES)
    return tokenizer


class Maker:
    """The traces' chains, and the examples made of them."""

    def __init__(self, prompts: Prompts, traces, mention) -> None:
        self.prompts = prompts
        self.chains = TraceChains(prompts, TITLES, traces, mention)
        self.examples = Examples(prompts, [np.array([0, 1, 2, 3])], TITLES, [""] * 4, chains=self.chains)

    def render(self, task: str, source: int, variant: int) -> Example:
        return tasks()[task].render(self.examples, source, slice(0, 1), -1, variant)


def make(tokenizer, *traces: Trace, chat: bool = False, mention="codes") -> Maker:
    vocabulary = Vocabulary.extend(tokenizer, SIZES)
    ids, prompter = vocabulary.item_token_ids(CODES), Prompter(tokenizer, chat=chat)
    prompts = Prompts(prompter, "History:{history}", ids, vocabulary.begin_id, tokenizer.eos_token_id)
    return Maker(prompts, traces or (TRACE,), mention)


def learnt(labels: list[int]) -> list[int]:
    return [label for label in labels if label != -100]


CHAIN = (
    " Evidence: wood<|a_0|><|b_0|><|c_0|>, steel<|a_0|><|b_0|><|c_1|><|a_1|><|b_2|>. Taste: home, garden."
    " Wants: garden. Next: toys. Keep:<|a_0|><|b_0|><|c_1|><|a_1|><|b_2|>.</think>"
)


@pytest.mark.parametrize("chat", [False, True])
def test_the_whole_of_it_reads_as_written_and_is_learnt_from_the_chain_on(tokenizer, chat):
    maker = make(tokenizer, chat=chat)
    ids, labels = maker.render("reason", 0, 0)
    prompt = maker.prompts.reasoning(TRACE.history)
    assert ids[: len(prompt)] == prompt
    assert labels[: len(prompt)] == [-100] * len(prompt)
    assert labels[len(prompt) :] == ids[len(prompt) :]
    assert tokenizer.decode(prompt).endswith(THINK)
    assert tokenizer.decode(learnt(labels)) == f"{CHAIN}<|item|><|a_2|><|b_3|>"
    answer = maker.prompts.item_token_ids[3]
    opening = maker.prompts.answer_opening_ids
    assert ids[-len(answer) - len(opening) :] == [*opening, *answer]
    assert ids.count(maker.prompts.begin_id) == 1
    # The same history without a chain: the modes part where one has the begin marker and the other the delimiter.
    direct = maker.prompts.direct(TRACE.history)
    assert prompt == [*direct[:-1], *maker.prompts.think_ids]
    assert maker.chains.ids(TRACE) == ids[len(direct) - 1 : -len(answer) - 1]


def test_the_five_sentences_make_up_the_chain(tokenizer):
    maker = make(tokenizer)
    whole = learnt(maker.render("reason", 0, 0)[1])
    parts = [maker.render(stage, 0, 0) for stage in STAGES]
    assert [token for _, labels in parts for token in learnt(labels)] == whole[: -len(maker.prompts.item_token_ids[3])]
    for (ids, labels), (longer, _) in pairwise(parts):
        assert longer[: len(ids)] == ids, "each stage reads those before it"
        assert labels[-1] != -100


@pytest.mark.parametrize("task", [*STAGES, "itemsearch", "preferenceobtain"])
def test_every_task_works_alone(tokenizer, task):
    maker = make(tokenizer, *[STRIPPED] * 2, TRACE)
    assert maker.chains.eligible(task).tolist() == (
        [2] if task in ("intent", "formulation", "rewriting", "itemsearch") else [0, 1, 2]
    )
    shown = set()
    for variant in range(1, 16, 2):
        ids, labels = maker.render(task, 2, variant)
        answer = learnt(labels)
        assert ids[-len(answer) :] == answer
        assert labels[: -len(answer)] == [-100] * (len(ids) - len(answer))
        shown.add(tokenizer.decode(ids[: -len(answer)]))
        if task == "itemsearch":
            assert answer == maker.prompts.item_token_ids[3]
            assert ids[-len(answer) - 1] == maker.prompts.begin_id
        else:
            assert answer[-1] == tokenizer.eos_token_id
            stage = "preference" if task == "preferenceobtain" else task
            text = tokenizer.decode(answer[:-1]).strip()
            assert text in CHAIN
            assert stage != "rewriting" or text == "<|a_0|><|b_0|><|c_1|><|a_1|><|b_2|>"
    assert len(shown) >= (2 if task in ("itemsearch", "preferenceobtain") else 1)
    assert not any(TRACE.formulation in text for text in shown), "nothing asked gives the suggestion away"


def test_a_trace_that_lost_a_stage_has_a_shorter_chain(tokenizer):
    maker = make(tokenizer, STRIPPED)
    text = tokenizer.decode(learnt(maker.render("reason", 0, 0)[1]))
    assert "Next" not in text
    assert "Wants" not in text
    with pytest.raises(UserError, match="no trace has what the task itemsearch needs"):
        maker.chains.eligible("itemsearch")


def test_items_may_be_named_by_their_titles_which_stay_text(tokenizer):
    control = set(tokenizer.get_added_vocab().values())
    titles = make(tokenizer, mention="titles")
    chain = titles.chains.ids(TRACE)
    assert not set(chain) & control
    text = tokenizer.decode(chain)
    assert "steel steel kettle, tent‹/think›‹|a_1|›. Taste" in text
    assert text.count("</think>") == 1
    both = tokenizer.decode(make(tokenizer, mention="both").chains.ids(TRACE))
    assert "wood oak lamp<|a_0|><|b_0|><|c_0|>, steel steel kettle<|a_0|>" in both


def test_delimiters_that_are_tokens_are_used_as_such(tiny_base):
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.add_tokens(["<think>", "</think>"])
    maker = make(tokenizer)
    assert maker.prompts.think_ids == (tokenizer.convert_tokens_to_ids("<think>"),)
    assert maker.chains.ids(TRACE).count(tokenizer.convert_tokens_to_ids("</think>")) == 1
