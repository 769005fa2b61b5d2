"""Rewards by name and from files, and the checks around a call."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reasonrec.rewards.calling import BEAM, CODES, CONTEXT, REQUIRABLE, ROWS, Reward, take
from reasonrec.rewards.cases import cases, make_batch
from reasonrec.rewards.registry import REWARDS, RewardSpec, load_reward, load_rewards, names, reward, reward_files
from reasonrec.tokenizers.errors import UserError


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    names()  # the kit's, before the copy
    monkeypatch.setattr(REWARDS, "_entries", dict(REWARDS._entries))


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def write_file(code: str, name: str = "mine.py") -> str:
        (tmp_path / name).write_text(code)
        return str(tmp_path / name)

    return write_file


GOOD = "def f(*, completions, **_):\n    return [float(len(text)) for text in completions]\n"


def of_the_kit() -> list[str]:
    """Names of the kit's own rewards: a test that ran before in this process may have registered others."""
    return [name for name in names() if load_reward(name).function.__module__.startswith("reasonrec.rewards.")]


def test_the_kit_has_all_families() -> None:
    assert set(of_the_kit()) == {
        "exact", "prefix", "rsvr", "rank", "format", "length", "repetition", "collaborative", "likelihood",
        "probability", "set_overlap", "path", "category", "category_steps", "consistency",
    }  # fmt: skip
    assert load_reward("rank").requires == ("beam_items",)
    assert load_reward("likelihood").requires == ("target_log_prob",)
    assert load_reward("collaborative").requires == ("similarity",)
    assert load_reward("exact").requires == ()


def test_the_kits_rewards_take_what_a_caller_provides() -> None:
    for reasoning in (True, False):
        batch = make_batch(cases(reasoning), reasoning)
        assert set(batch) == {*ROWS, *CONTEXT, *REQUIRABLE}
        for name in names():
            assert len(load_reward(name)(**batch)) == len(batch["completions"])


def test_a_file(write: Callable[..., str]) -> None:
    loaded = load_reward(write(GOOD) + ":f")
    assert loaded.name == "f"
    assert loaded(completions=["ab", ""], prompts=["", ""], trainer_state=None) == [2.0, 0.0]


def test_a_file_that_changed_is_read_again_and_an_equal_one_is_not(write: Callable[..., str]) -> None:
    first = load_reward(write(GOOD) + ":f")
    assert load_reward(write(GOOD) + ":f").function is first.function
    again = load_reward(write(GOOD.replace("float", "-float")) + ":f")
    assert again(completions=["ab"]) == [-2.0]


def test_a_decorated_function_keeps_its_name_and_needs(write: Callable[..., str]) -> None:
    code = (
        "from reasonrec.rewards.registry import reward\n"
        "@reward(name='mine', requires='similarity')\n"
        "def f(*, completions, beam_items, **_):\n    return [0.0 for _ in completions]\n"
    )
    loaded = load_reward(write(code) + ":f")
    assert loaded.name == "mine"
    assert loaded.requires == ("beam_items", "similarity")  # one from its keywords
    assert load_reward("mine").function is loaded.function
    with pytest.raises(UserError, match="'mine' needs beam_items"):
        loaded(completions=["a"], similarity=None)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rsvrr", "did you mean 'rsvr'"),
        ("nothing like it", "known are exact, prefix, rsvr, rank, format, length, repetition, collaborative"),
        ("{folder}/mien.py:f", "no file .*mien.py; did you mean 'mine.py'"),
        ("{folder}/none/x.py:f", "no file .*paths start where the command runs"),
        ("{folder}/mine.py:g", "no function 'g'.*valid are f, twice"),
        ("{folder}/mine.py:twise", "did you mean 'twice'"),
        ("{folder}/mine.py", r"write path/to/file.py:function.*valid are f"),
        ("{folder}/mine:f", "no file .*mine; did you mean 'mine.py'"),
        ("{folder}/mine.py:VALUE", "is a int, not a function"),
        ("{folder}/broken.py:f", "running .*broken.py failed with SyntaxError"),
        ("{folder}/ends.py:f", "running .*ends.py failed with SystemExit: 0"),
        ("{folder}/raises.py:f", "running .*raises.py failed with ZeroDivisionError"),
    ],
)
def test_what_cannot_be_found(spec: str, message: str, write: Callable[..., str], tmp_path: Path) -> None:
    write(GOOD + "VALUE = 3\ndef twice(*, completions, **_):\n    return []\n")
    write("def f(:", "broken.py")
    write("1 / 0", "raises.py")
    write("raise SystemExit(0)", "ends.py")
    with pytest.raises(UserError, match=message):
        load_reward(spec.format(folder=tmp_path))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def f(completions, **_): ...", "takes 'completions' by position"),
        ("def f(*args, **_): ...", "takes 'args' by position"),
        ("def f(*, completions): ...", r"\*\*_ at the end"),
        ("def f(*, prediction_codes, **_): ...", "wants 'prediction_codes'.*did you mean 'predicted_codes'"),
        ("class f: ...", "not a function"),
        ("f = max", "does not say which keywords it takes"),
        ("async def f(*, completions, **_): ...", "asynchronous"),
    ],
)
def test_what_cannot_be_called(code: str, message: str, write: Callable[..., str]) -> None:
    with pytest.raises(UserError, match=message):
        load_reward(write(code) + ":f")


def test_names_are_not_taken_away() -> None:
    with pytest.raises(UserError, match="'exact' exists already"):
        reward(name="exact")(lambda *, completions, **_: [])
    with pytest.raises(UserError, match="requires 'beam_item'; did you mean 'beam_items'"):
        reward(name="other", requires=("beam_item",))(lambda *, completions, **_: [])


def test_rewards_say_what_they_cannot_do_without() -> None:
    needs = {name: load_reward(name).of_policy for name in of_the_kit()}
    assert {name: keywords for name, keywords in needs.items() if keywords} == {
        "prefix": ("predicted_codes", "target_codes"),
        "rsvr": ("predicted_codes", "target_codes", "depth"),
        "set_overlap": ("predicted_codes", "target_codes"),
        "path": ("predicted_codes", "target_codes"),
        "category_steps": ("category_probs",),
        "consistency": ("category_probs",),
    }


def test_rewards_that_the_policy_gives_too_little_are_refused() -> None:
    given = {"dual_head": (), "semantic_id": CODES, "other": CODES}
    load_rewards({"exact": 1, "likelihood": 1, "length": 0, "category": 1}).check_policy("dual_head", given)
    load_rewards({"rsvr": 1, "set_overlap": 1, "path": 1}).check_policy("semantic_id", given)
    message = (
        r"^reward 'rsvr' reads predicted_codes, target_codes, depth, which the policy dual_head does not give; "
        r"policies that do are semantic_id, other$"
    )
    with pytest.raises(UserError, match=message):
        load_rewards({"exact": 1, "rsvr": 0}).check_policy("dual_head", given)
    message = r"^reward 'consistency' reads category_probs, which the policy semantic_id does not give; "
    with pytest.raises(UserError, match=message + "no policy does$"):
        load_rewards({"exact": 1, "consistency": 0.5}).check_policy("semantic_id", given)
    with pytest.raises(UserError, match=message + "policies that do are parallel$"):
        load_rewards({"consistency": 1}).check_policy("semantic_id", given | {"parallel": (*CODES, "category_probs")})


def test_what_works_on_items_is_called_without_codes() -> None:
    for reasoning in (True, False):
        batch = make_batch(cases(reasoning), reasoning)
        bare = {name: value for name, value in batch.items() if name not in CODES}
        for name in set(of_the_kit()) - {"prefix", "rsvr", "set_overlap", "path"}:
            assert load_reward(name)(**bare) == load_reward(name)(**batch)


def test_a_list_is_as_wide_as_the_widest_reward_wants(write: Callable[..., str]) -> None:
    assert (load_reward("rank").width, load_reward("rank", {"k": 50}).width) == (10, 50)
    assert load_reward(write("def f(*, beam_items, **_): ...") + ":f").width == BEAM
    own = write("def f(*, beam_items, k=None, **_): ...") + ":f"
    assert (load_reward(own).width, load_reward(own, {"k": 3}).width) == (BEAM, 3)
    assert load_rewards({"rank": 1, own: {"weight": 0, "k": 50}}).width == 50
    assert load_rewards({"exact": 1}).width == 0, "no list is wanted"
    for k in (0, -1, 2.5, True, "10"):
        with pytest.raises(UserError, match=r"^reward 'rank': k=.* has to be a whole number, at least 1"):
            load_reward("rank", {"k": k})


def calls(values: Any) -> Reward:
    return Reward("mine", lambda *, completions, **_: values)


LONG = "x" * 5000


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], r"1 values for 2 completions; the first completion is 'first'"),
        ([1.0, float("nan")], "nan for the completion 'xxx.*xx.* \\(row 1\\)"),
        ([1.0, float("inf")], "inf for the completion"),
        ([1.0, "0.5"], "'0.5' \\(str\\)"),
        ([True, 1.0], "True \\(bool\\) for the completion 'first' \\(row 0\\)"),
        ([np.True_, 1.0], "bool"),
        (None, "returned NoneType"),
        (1.0, "returned float"),
        ({"a": 1.0}, "returned dict"),
        (np.zeros((2, 1)), "list"),
        (np.array([True, False]), "bool"),
        ([1 + 0j, 1.0], "complex"),
        ([1.0, 1e300], r"1e\+300 for the completion 'xxx.*finite and at most 1e\+06 in size"),
        ([1.0, -1.1e6], r"-1.1e\+06 for the completion .* at most 1e\+06 in size"),
        ([10**400, 1.0], "inf for the completion 'first'"),
        (np.array([1.0, 1e7], dtype=np.float32), r"1e\+07 for the completion"),
        (torch.ones(2, device="meta"), "raised NotImplementedError"),
    ],
)
def test_what_a_reward_may_not_return(values: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        calls(values)(completions=["first", LONG])
    assert "'mine'" in str(caught.value)
    assert "one float or None for each completion" in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "values",
    [[1, None], (1.0, None), [np.float32(1), None], np.array([1.0, 0.0]), np.array([1, 0]), torch.tensor([1.0, 0.0])],
)
def test_what_a_reward_may_return(values: Any) -> None:
    result = calls(values)(completions=["first", "second"])
    assert result[0] == 1.0
    assert all(type(value) is float or value is None for value in result)


def loud(**_: Any) -> list[float]:
    raise ZeroDivisionError("\x1b[2J a\nb" + "x" * 5000)


def test_a_reward_that_raises_is_named_with_the_completion() -> None:
    def f(*, completions: list[str], **_: Any) -> list[float]:
        return [1 / len(text) for text in completions]

    with pytest.raises(UserError, match=r"'mine' raised ZeroDivisionError: .* on the completion '' \(row 1\)"):
        Reward("mine", f)(completions=["ab", ""], depth=2)
    with pytest.raises(UserError, match=r"'mine' raised SystemExit: 0 on the completion 'a' \(row 0\)"):
        Reward("mine", lambda *, completions, **_: sys.exit(0))(completions=["a"])
    with pytest.raises(UserError, match=r"raised ZeroDivisionError: \\x1b\[2J a bx+ … x+ on the completion") as caught:
        Reward("mine", loud)(completions=["a"])
    assert len(str(caught.value)) < 700
    with pytest.raises(UserError, match="on the batch as a whole"):
        Reward("mine", lambda *, completions, **_: [1.0] if len(completions) < 2 else [][0])(completions=["a", "b"])
    with pytest.raises(UserError, match=r"^reward 'rank': k=0"):
        load_reward("rank", {"k": 0})(completions=["a"], beam_items=[[1]], target_items=[1])


def test_rows_are_taken_and_context_is_shared() -> None:
    batch = {"completions": ["a", "b", "c"], "depth": 3, "train_counts": [1, 2, 3], "target_log_prob": [-1, -2, -3]}
    assert take(batch, [2, 0]) == {
        "completions": ["c", "a"], "depth": 3, "train_counts": [1, 2, 3], "target_log_prob": [-3, -1],
    }  # fmt: skip


def test_weights_in_yaml(write: Callable[..., str]) -> None:
    own = write(GOOD) + ":f"
    rewards = load_rewards({"exact": 1.0, own: "2e-1", "length": 0, "repetition": {"weight": 0.5, "n": 2}})
    assert rewards.names == ("exact", "f", "length", "repetition")
    assert rewards.weights == (1.0, 0.2, 0.0, 0.5)
    assert rewards.requires == ()
    values = rewards(
        completions=["ab", "a"],
        predicted_items=[1, -1],
        target_items=[1, 1],
        chains=[[1] * 20, [3] * 3],
        reasoning=True,
    )
    assert values.tolist() == [[1, 2, 1, -18 / 19], [0, 1, 0, -0.5]]
    assert rewards.total(values).tolist() == pytest.approx([1 + 0.4 - 9 / 19, 0.2 - 0.25])


def test_weight_zero_changes_nothing() -> None:
    rewards = load_rewards({"exact": 1.0, "prefix": 0.5, "rsvr": 0})
    nan = float("nan")
    values = np.array([[1, 0.5, 9], [1, nan, 9], [nan, nan, 9], [0, 0, nan]])
    total = rewards.total(values)
    assert total.tolist()[:2] == [1.25, 1.0]
    assert np.isnan(total[2]), "what only a reward of weight 0 scores is not scored"
    assert total[3] == 0
    other = values.copy()
    other[:, 2] = nan
    np.testing.assert_array_equal(rewards.total(other), total)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rsvr": True}, "'rsvr': weight True"),
        ({"rsvr": None}, "weight None"),
        ({"rsvr": float("nan")}, "weight nan"),
        ({"rsvr": 1e300}, r"weight 1e\+300 \(float\): a weight is a finite number of at most 1e\+06"),
        ({"rsvr": -(10**400)}, "weight -1000.* at most"),
        ({"rsvr": "much"}, "'rsvr': could not convert"),
        ({"rsvr": [1]}, "weight \\[1\\]"),
        ({"rsvr": {"n": 1}}, "write {weight: 1.0"),
        ({"rsvr": {"weight": 1, "n": 1}}, "'rsvr' has no option 'n'"),
        ({"length": {"weight": 1, "longst": 1}}, "did you mean 'longest'"),
        ({"rsvr": 0}, "nothing is rewarded"),
        ({}, "nothing is rewarded"),
        ({"rsver": 1}, "did you mean 'rsvr'"),
    ],
)
def test_wrong_weights(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_rewards(config)


def test_two_files_with_functions_of_one_name_keep_apart(write: Callable[..., str]) -> None:
    first, second = write(GOOD) + ":f", write(GOOD + "# other\n", "other.py") + ":f"
    assert load_rewards({first: 1, second: 1, "exact": 0}).names == (first, second, "exact")


def test_a_spec_is_a_weight_and_options() -> None:
    assert RewardSpec.read("x", 2) == RewardSpec(2)
    assert RewardSpec.read("x", {"weight": -1.5, "n": 3}) == RewardSpec(-1.5, {"n": 3})


def test_files_of_rewards_are_known_by_their_content(write: Callable[..., str]) -> None:
    path = write("def f(*, completions, **_):\n    return [0.0] * len(completions)\n")
    config = {f"{path}:f": 1.0, f"{path}:g": 0, "rsvr": {"weight": 1.0}}
    first = reward_files(config)
    assert list(first) == [Path(path).name]
    assert reward_files({"rsvr": 1.0}) == {}
    write("def f(*, completions, **_):\n    return [1.0] * len(completions)\n")
    assert reward_files(config) != first
