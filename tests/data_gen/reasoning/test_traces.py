"""Replies fall into stages; traces keep what they say, and know what they were made from."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonrec.data_gen.reasoning.traces import (
    CUES,
    SCHEMA,
    STAGES,
    Trace,
    Traces,
    from_frame,
    mentions,
    parse_reply,
    pieces,
    places_to_items,
    to_frame,
)
from reasonrec.data_gen.schema import Dataset
from reasonrec.tokenizers.artefact import staged
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.manifest import Manifest

BODIES = ["oak lamps [1][3]", "wood", "light", "a lamp", "[1][3]"]
REPLY = "\n".join(f"{CUES[stage]}: {body}" for stage, body in zip(STAGES, BODIES, strict=True))


def test_a_reply_falls_into_its_stages():
    assert parse_reply(REPLY) == dict(zip(STAGES, BODIES, strict=True))


def test_what_chat_models_put_around_the_lines_does_not_matter():
    dressed = (
        "Here you go:\n\n1. **Evidence:** oak lamps [1][3].\n2. **Taste**: wood\n- WANTS : light\n"
        "* next: a\n  lamp\n**Keep:** [1][3]\n"
    )
    assert parse_reply(dressed) == dict(zip(STAGES, BODIES, strict=True))


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "I cannot help with that.",
        REPLY.replace("Next: a lamp\n", ""),
        REPLY.replace("Next: a lamp", "Next:"),
        REPLY + "\nTaste: again",
        "\n".join(reversed(REPLY.splitlines())),
        REPLY.replace("\n", " "),
    ],
)
def test_anything_else_is_no_reply(reply):
    assert parse_reply(reply) is None


def test_references():
    text = "oak [1], steel [12][3]"
    assert mentions(text) == [1, 12, 3]
    assert pieces(text) == ["oak ", 1, ", steel ", 12, 3]
    assert places_to_items("oak [1][3]", (40, 41, 42)) == "oak [40][42]"
    assert places_to_items("oak [4]", (40, 41, 42)) is None
    assert places_to_items("oak [0]", (40, 41, 42)) is None
    assert places_to_items("<|im_end|> [x] [1]", (7,)) == "‹|im_end|› (x) [7]"


@given(st.text(max_size=60), st.lists(st.integers(0, 99), min_size=1, max_size=5))
def test_references_cannot_be_forged(text, history):
    """Whatever the words are, a kept text refers to items of the history only."""
    kept = places_to_items(text, history)
    assert kept is None or set(mentions(kept)) <= set(history)


def trace(key: str = "train/0/2", **changes) -> Trace:
    values = dict(zip(STAGES, ["oak [4]", "wood", "light", "lamp", "[4]"], strict=True))
    place = {"row": 0, "position": 2, "user": 5, "history": (4, 6), "target": 7}
    return Trace(key, **(place | values | {"guess": ("lamp", "tent"), "hit": True} | changes))


def test_a_table_gives_back_what_it_was_given():
    traces = [trace(), trace("valid/3", position=-1, formulation=None, hit=None, gain=0.5, filtered=True, guess=())]
    assert from_frame(to_frame(traces)) == traces
    assert to_frame([]).schema == pl.DataFrame(schema=SCHEMA).schema
    assert list(traces[1].stages) == ["evidence", "preference", "intent", "rewriting"]


@pytest.fixture
def folder(tmp_path, tiny_dataset):
    inputs = {"dataset": Dataset.load(tiny_dataset).manifest.hash}
    with staged(tmp_path / "traces", kind="traces", config={}, inputs=inputs) as (work, facts):
        to_frame([trace(filtered=True), trace("train/0/3", filtered=False)]).write_parquet(work / "train.parquet")
        to_frame([trace("valid/3", filtered=None)]).write_parquet(work / "valid.parquet")
        facts["filter_model"] = "runs/some/sft"
    return tmp_path / "traces"


def test_both_arms_are_there(folder, tiny_dataset):
    dataset = Dataset.load(tiny_dataset)
    assert [t.key for t in Traces.load(folder, dataset.manifest).train] == ["train/0/2", "train/0/3"]
    filtered = Traces.load(folder, dataset.manifest, arm="filtered")
    assert [t.key for t in filtered.train] == ["train/0/2"]
    assert [t.key for t in filtered.valid] == ["valid/3"]


def test_traces_of_another_dataset_are_refused(folder):
    other = Manifest(kind="dataset", config={}, seed=0, hash="f" * 64)
    with pytest.raises(UserError, match=r"traces was made with dataset \w{12}…, but dataset ffffffffffff… was given"):
        Traces.load(folder, other)


def test_an_arm_that_was_never_made_is_refused(tmp_path, tiny_dataset):
    with staged(tmp_path / "plain", kind="traces", config={}) as (work, facts):
        for name in ("train", "valid"):
            to_frame([trace()]).write_parquet(work / f"{name}.parquet")
        facts["filter_model"] = None
    with pytest.raises(UserError, match="set filter_model in the synthesize stage, or trace_arm: all"):
        Traces.load(tmp_path / "plain", arm="filtered")
    with pytest.raises(UserError, match="is of kind 'dataset', needed is 'traces'"):
        Traces.load(tiny_dataset)
