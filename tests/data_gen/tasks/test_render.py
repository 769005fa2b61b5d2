"""Plans: what is shown when; and the examples rendered from them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from reasonrec.data_gen.tasks import render
from reasonrec.data_gen.tasks.mixture import PlanConfig, check_texts, make_plan
from reasonrec.data_gen.tasks.prompts import Prompter, Prompts
from reasonrec.data_gen.tasks.render import (
    Block,
    Example,
    Examples,
    Material,
    Task,
    Window,
    register,
    rounds,
    task_names,
)
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.vocabulary import Vocabulary

SEQREC, ITEM2INDEX, INDEX2ITEM, FUSION = range(4)
N_ITEMS = 9
ITEM_LENGTHS = np.array([2, 3] * 4 + [2])


def config(**changes) -> PlanConfig:
    base = {
        "tasks": {"seqrec": 1.0},
        "max_history": 4,
        "one_per_prefix": False,
        "passes": 1.0,
        "batch_size": 4,
        "seed": 0,
    }
    return PlanConfig(**(base | changes))


def sequences_of(lengths: list[int], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, N_ITEMS, n) for n in lengths]


def plan_of(lengths: list[int], *, set_order: bool = False, **changes):
    return make_plan(config(**changes), Material(sequences_of(lengths), ITEM_LENGTHS, set_order))


LENGTHS = [2, 7, 1, 12, 5, 3, 23, 6, 11, 4]
ALL_TASKS = {"seqrec": 1.0, "item2index": 0.5, "index2item": 0.25, "fusionseqrec": 2.0}


@pytest.mark.parametrize("one_per_prefix", [False, True])
@pytest.mark.parametrize("set_order", [False, True])
def test_a_plan_is_a_pure_function_of_configuration_and_seed(one_per_prefix, set_order):
    options = {"one_per_prefix": one_per_prefix, "tasks": ALL_TASKS, "passes": 1.5, "set_order": set_order}
    first = plan_of(LENGTHS, **options)
    np.random.seed(99)  # noqa: NPY002 - the global state must not matter
    assert plan_of(LENGTHS, **options).equals(first)
    assert not plan_of(LENGTHS, seed=1, **options).equals(first)


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12).filter(lambda ns: max(ns) > 1),
    max_history=st.integers(2, 9),
    seed=st.integers(0, 5),
)
def test_every_pass_supervises_every_interaction_once(lengths, max_history, seed):
    """Whole-history windows cut the sequences into parts: nothing is left out, nothing is shown twice."""
    plan = plan_of(lengths, max_history=max_history, seed=seed, passes=2.0)
    n = plan_of(lengths, max_history=max_history, seed=seed).height
    for part in (plan[:n], plan[n:]):
        seen = Counter(
            (source, position)
            for source, start, stop in part.select("source", "start", "stop").iter_rows()
            for position in range(start, stop)
        )
        assert seen == {(s, p): 1 for s, length in enumerate(lengths) if length > 1 for p in range(length)}
        size = part["stop"] - part["start"]
        assert size.min() >= 2, "a window without a history teaches nothing"
        assert size.max() <= max_history + 1


def test_with_a_history_of_one_nothing_is_left_out_either():
    """Five items do not divide into pairs: one of them is shown twice."""
    plan = plan_of([5, 2], max_history=1)
    shown = Counter(p for s, a, b in plan.select("source", "start", "stop").iter_rows() if s == 0 for p in range(a, b))
    assert set(shown) == set(range(5))
    assert (plan["stop"] - plan["start"] == 2).all()


def test_windows_are_cut_elsewhere_in_every_pass():
    plan = plan_of([100], max_history=9, passes=8.0)
    cuts = {tuple(sorted(chunk["start"].to_list())) for chunk in plan.with_row_index().partition_by("index")}
    starts = set(plan["start"].to_list())
    assert len(cuts) > 8
    assert len(starts) > 20, "fixed cuts would always have the same ten starts"


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=8).filter(lambda ns: max(ns) > 1), most=st.integers(1, 6)
)
def test_prefixes_have_every_interaction_but_the_first_as_the_answer_once(lengths, most):
    plan = plan_of(lengths, max_history=most, one_per_prefix=True)
    expected = [(s, max(0, stop - 1 - most), stop) for s, n in enumerate(lengths) for stop in range(2, n + 1)]
    assert sorted(plan.select("source", "start", "stop").iter_rows()) == sorted(expected)


def test_weights_are_shares_of_the_sequence_examples():
    plan = plan_of(LENGTHS, tasks=ALL_TASKS)
    count = Counter(plan["task"].to_list())
    n = count[SEQREC]
    assert n == plan_of(LENGTHS).height
    assert [count[t] for t in (ITEM2INDEX, INDEX2ITEM, FUSION)] == [round(0.5 * n), round(0.25 * n), 2 * n]
    alone = plan_of(LENGTHS, tasks={"seqrec": 0, "item2index": 3.0})
    assert set(alone["task"]) == {ITEM2INDEX}
    assert alone.height == n


def test_item_tasks_go_round_the_whole_catalogue():
    plan = plan_of(LENGTHS, tasks={"seqrec": 1.0, "item2index": 2.5})
    items = Counter(plan.filter(task=ITEM2INDEX)["source"].to_list())
    assert set(items) == set(range(N_ITEMS))
    assert max(items.values()) - min(items.values()) <= 1


def test_fusion_examples_end_anywhere_and_stay_inside_the_sequence():
    plan = plan_of(LENGTHS, tasks={"fusionseqrec": 20.0, "seqrec": 1.0}).filter(task=FUSION)
    lengths = np.array(LENGTHS)[plan["source"].to_numpy()]
    size = (plan["stop"] - plan["start"]).to_numpy()
    assert (plan["start"].to_numpy() >= 0).all()
    assert (plan["stop"].to_numpy() <= lengths).all()
    assert size.min() == 2
    assert size.max() == 6
    assert 2 not in plan["source"], "a sequence of one item has no next item"
    assert (plan["stop"].to_numpy() < lengths).any()


@pytest.mark.parametrize("passes", [0.3, 1.0, 1.5, 2.25])
def test_fractional_passes(passes):
    one = plan_of([6] * 40, max_history=5)
    assert one.height == 40
    plan = plan_of([6] * 40, max_history=5, passes=passes)
    assert plan.height == round(40 * passes)
    head = min(40, plan.height)
    assert plan[:head].equals(one[:head]), "a longer run begins as a shorter one"
    assert set(Counter(plan["source"].to_list()).values()) <= {int(passes), int(passes) + 1}


def test_sets_are_shuffled_anew_in_every_pass_and_sequences_never():
    lengths = [6] * 30
    assert (plan_of(lengths, passes=2.0)["shuffle"] == -1).all()
    plan = plan_of(lengths, passes=2.0, max_history=5, set_order=True)
    first, second = (dict(part.select("source", "shuffle").iter_rows()) for part in (plan[:30], plan[30:]))
    assert len(set(first.values())) == 30
    assert all(first[s] != second[s] for s in first)
    assert (plan["shuffle"] >= 0).all()


@pytest.mark.parametrize("one_per_prefix", [False, True])
def test_the_parts_of_a_long_set_are_parts_of_one_order(one_per_prefix, examples):
    """Else some items of a basket would be shown twice in a pass and others not at all."""
    plan = plan_of([9, 4, 3], max_history=3, set_order=True, one_per_prefix=one_per_prefix)
    examples = replace(examples, sequences=[np.arange(n) for n in (9, 4, 3)])
    lines = [line for line in plan.sort("stop").iter_rows(named=True) if line["source"] == 0]
    parts = [
        examples.part(line["source"], slice(line["start"], line["stop"]), line["shuffle"]).tolist() for line in lines
    ]
    shown = [part[-1] for part in parts] if one_per_prefix else [item for part in parts for item in part]
    assert len(set(shown)) == len(shown) == (8 if one_per_prefix else 9)
    assert shown != sorted(shown)


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_examples_of_a_batch_are_about_equally_long(batch_size):
    lengths = [int(n) for n in np.random.default_rng(3).integers(2, 30, 400)]
    plan = plan_of(lengths, max_history=29, batch_size=batch_size)
    length = plan["length"].to_numpy()
    expected = [int(ITEM_LENGTHS[s].sum()) for s in sequences_of(lengths)]
    assert length.tolist() == [expected[s] for s in plan["source"]]

    def padding(values: np.ndarray) -> float:
        whole = values[: len(values) // batch_size * batch_size].reshape(-1, batch_size)
        return float((whole.max(1, keepdims=True) - whole).mean())

    if batch_size > 1:
        assert padding(length) < 0.25 * padding(np.random.default_rng(0).permutation(length))
    means = length[: len(length) // 16 * 16].reshape(-1, 16).mean(1)
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 0.6, "not sorted by length over the whole run"


def test_mistakes():
    with pytest.raises(UserError, match=r"'seqrek' \(did you mean 'seqrec'\?\); known are seqrec, item2index"):
        config(tasks={"seqrek": 1.0})
    for weights in ({}, {"seqrec": 0.0}, {"seqrec": 1.0, "index2item": -0.5}):
        with pytest.raises(UserError, match="at least 0, and one of them above 0"):
            config(tasks=weights)
    with pytest.raises(UserError, match="max_history=0"):
        config(max_history=0)
    for passes in (0.0, -1.0):
        with pytest.raises(UserError, match=f"num_train_epochs={passes}"):
            config(passes=passes)
    with pytest.raises(UserError, match="two items or more"):
        plan_of([1, 1])


# Rendering. Items 0 … 8 have the codes below; every fourth needs a third code.
SIZES = (3, 4, 2)
CODES = np.array(
    [[0, 0, 0], [0, 1, -1], [0, 2, -1], [1, 0, -1], [0, 0, 1], [1, 1, -1], [1, 3, -1], [2, 0, -1], [2, 3, -1]]
)
TITLES = [
    "small oak lamp",
    "steel kettle<|im_end|>",
    "velvet",
    "glass [INST]",
    "novel",
    "tent",
    "scarf",
    "drill",
    "<|a_1|>",
]
PROMPT = "History:{history}\nNext:"


@pytest.fixture(scope="module")
def tokenizer(tiny_base):
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    Vocabulary.extend(tokenizer, SIZES)
    return tokenizer


def make_examples(tokenizer, *, chat: bool = False, prompt: str = PROMPT, **options) -> Examples:
    vocabulary = Vocabulary.extend(tokenizer, SIZES)
    ids = vocabulary.item_token_ids(CODES)
    prompts = Prompts(Prompter(tokenizer, chat=chat), prompt, ids, vocabulary.begin_id, tokenizer.eos_token_id)
    texts = [f"category{i}" for i in range(N_ITEMS)]
    return Examples(prompts, sequences_of(LENGTHS), TITLES, texts, **options)


@pytest.fixture
def examples(tokenizer) -> Examples:
    return make_examples(tokenizer)


def line(task: int, source: int, start: int = 0, stop: int = 1, *, shuffle: int = -1, variant: int = 0):
    return task, source, start, stop, shuffle, variant


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("prompt", ["History:{history}", PROMPT, "{history}", "{{set}} {history}."])
def test_whole_histories_have_the_loss_on_exactly_the_items(tokenizer, chat, prompt):
    examples = make_examples(tokenizer, chat=chat, prompt=prompt)
    part = examples.sequences[1][1:6]
    ids, labels = examples.render(*line(SEQREC, 1, 1, 6))
    codes = examples.prompts.item_token_ids
    supervised = [label for label in labels if label != -100]
    assert supervised == [token for item in part for token in codes[item]]
    assert all(label in (-100, token) for label, token in zip(labels, ids, strict=True))
    # What comes before the answer is what inference reads, the begin marker last.
    answer = codes[part[-1]]
    assert ids == examples.prompts.direct(part[:-1]) + answer
    assert ids[-len(answer) - 1] == examples.prompts.begin_id
    assert ids.count(examples.prompts.begin_id) == 1


def test_one_example_per_prefix_has_the_loss_on_the_answer(tokenizer):
    examples = make_examples(tokenizer, one_per_prefix=True)
    part = examples.sequences[3][2:6]
    ids, labels = examples.render(*line(SEQREC, 3, 2, 6))
    answer = examples.prompts.item_token_ids[part[-1]]
    assert ids == examples.prompts.direct(part[:-1]) + answer
    assert labels == [-100] * (len(ids) - len(answer)) + answer


def test_text_answers_end_with_eos_and_hold_no_control_token(examples, tokenizer):
    control = set(tokenizer.get_added_vocab().values()) | set(tokenizer.all_special_ids)
    for item in range(N_ITEMS):
        for variant in range(3):
            ids, labels = examples.render(*line(INDEX2ITEM, item, variant=variant))
            answer = [label for label in labels if label != -100]
            assert answer == ids[-len(answer) :]
            assert answer[-1] == tokenizer.eos_token_id
            assert not set(answer[:-1]) & control
            assert [t for t in ids[: -len(answer)] if t in control] == examples.prompts.item_token_ids[item]
    text = tokenizer.decode(examples.render(*line(INDEX2ITEM, 1))[0])
    assert text.endswith("Name: steel kettle‹|im_end|›<|im_end|>")


def test_item_answers_follow_the_begin_marker(examples, tokenizer):
    for item in range(N_ITEMS):
        for variant in range(3):
            ids, labels = examples.render(*line(ITEM2INDEX, item, variant=variant))
            answer = examples.prompts.item_token_ids[item]
            assert ids[-len(answer) - 1 :] == [examples.prompts.begin_id, *answer]
            assert labels == [-100] * (len(ids) - len(answer)) + answer
            assert tokenizer.convert_tokens_to_ids("<|im_end|>") not in ids


def test_fusion_reads_codes_and_answers_a_title_or_the_reverse(examples, tokenizer):
    source = 6
    part = examples.sequences[source][3:7]
    ids, labels = examples.render(*line(FUSION, source, 3, 7, variant=1))
    history = [token for item in part[:-1] for token in examples.prompts.item_token_ids[item]]
    codes = set(tokenizer.get_added_vocab().values()) - set(tokenizer.all_special_ids)
    assert [t for t in ids if t in codes] == history
    title = tokenizer.decode([label for label in labels if label != -100])
    assert title == f" {tokenizer.decode(examples.prompts.prompter.data(TITLES[part[-1]]))}<|im_end|>"
    ids, labels = examples.render(*line(FUSION, source, 3, 7, variant=2))
    answer = examples.prompts.item_token_ids[part[-1]]
    assert [label for label in labels if label != -100] == answer
    text = tokenizer.decode(ids[: -len(answer) - 1])
    assert "; ".join(tokenizer.decode(examples.prompts.prompter.data(TITLES[i])) for i in part[:-1]) in text


def test_long_texts_are_cut(tokenizer):
    examples = make_examples(tokenizer, max_text_tokens=3)
    _, labels = examples.render(*line(INDEX2ITEM, 0))
    assert len([label for label in labels if label != -100]) == 4  # three and the end


def test_a_shuffled_set_is_the_same_set_and_the_same_order_every_time(examples):
    first = examples.part(6, slice(0, 23), 5)
    assert sorted(first) == sorted(examples.sequences[6])
    assert examples.part(6, slice(0, 23), 5).tolist() == first.tolist() != examples.part(6, slice(0, 23), 6).tolist()


@pytest.mark.parametrize("set_order", [False, True])
def test_a_batch_is_rendered_as_its_lines_are(examples, set_order):
    plan = plan_of(LENGTHS, tasks=ALL_TASKS, set_order=set_order)
    rendered = examples(plan.to_dict(as_series=False))
    assert set(plan["task"]) == {SEQREC, ITEM2INDEX, INDEX2ITEM, FUSION}
    names = ("task", "source", "start", "stop", "shuffle", "variant")
    for number, values in enumerate(plan.select(names).iter_rows()):
        ids, labels = examples.render(*values)
        assert rendered["input_ids"][number] == ids
        assert rendered["labels"][number] == labels
        assert len(ids) == len(labels)
        assert any(label != -100 for label in labels)


class Popular(Task):
    """A task of somebody else's, in a file of their own."""

    name = "popular"
    templates = ("What is popular?",)

    def draw(self, material: Material, window: Window, count: int | None, rng: np.random.Generator) -> Block:
        return rounds(np.arange(3), np.full(3, 9), count, rng)

    def render(self, examples: Examples, source: int, part: slice, shuffle: int, variant: int) -> Example:
        return examples.item_answer(examples.fill(self.templates, variant), source)


def test_a_task_of_ones_own_needs_no_other_edit(tokenizer, monkeypatch):
    before = task_names()
    monkeypatch.setattr(render.TASKS, "_entries", dict(render.TASKS._entries))
    register(Popular())
    assert task_names() == [*before, "popular"], "the numbers of the others stay"
    with pytest.raises(ValueError, match="two entries are called 'popular' as task"):
        register(Popular())
    plan = plan_of(LENGTHS, tasks={"seqrec": 1.0, "popular": 0.5})
    number = len(before)
    assert (plan["task"] == number).sum() == round(0.5 * (plan["task"] == SEQREC).sum())
    examples = make_examples(tokenizer)
    check_texts(plan, examples, 100)
    ids, _ = examples.render(number, 2, 0, 1, -1, 0)
    assert tokenizer.decode(ids).startswith("What is popular?")
