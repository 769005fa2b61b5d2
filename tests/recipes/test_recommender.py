"""Loading what the SFT stage wrote, and what must not change its recommendations."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from reasonrec.data_gen.schema import Dataset
from reasonrec.recipes import recommender as module
from reasonrec.recipes.decoding.prefix import padded
from reasonrec.recipes.decoding.score import score_all_items
from reasonrec.recipes.models.precision import choose
from reasonrec.recipes.recommender import Recommender
from reasonrec.tokenizers.artefact import read_manifest
from reasonrec.tokenizers.errors import UserError

N_ITEMS = 48
MAX_HISTORY = 6  # of the shared adapter


@pytest.fixture(scope="module")
def recommender(adapter: Path) -> Recommender:
    return Recommender.from_pretrained(adapter, dtype=torch.float32)


@pytest.fixture(scope="module")
def histories(tiny_dataset: Path) -> list[list[int]]:
    found = Dataset.load(tiny_dataset).test["history"].to_list()
    return [history[: 1 + i % len(history)] for i, history in enumerate(found)]  # of all lengths


def test_it_comes_back_as_it_was_trained(recommender: Recommender, adapter: Path, tiny_base: Path) -> None:
    setting = recommender.setting
    assert (setting.base_model, setting.method, setting.max_history) == (str(tiny_base), "lora", MAX_HISTORY)
    assert recommender.policy.vocabulary.size == read_manifest(adapter).facts["rows"]
    assert not recommender.model.training
    assert next(recommender.model.parameters()).dtype == torch.float32
    assert str(recommender.precision) == "precision: fp32 on cpu (as asked)"
    other = Recommender.from_pretrained(adapter, dtype="bf16")
    assert next(other.model.parameters()).dtype == torch.bfloat16
    assert Recommender.from_pretrained(adapter).precision == choose("auto", "cpu")


def test_batch_size_and_padding_do_not_change_the_ranking(
    recommender: Recommender, histories: list[list[int]]
) -> None:
    alone, alone_scores = recommender.rank(histories, num_beams=20, batch_size=1)
    together, scores = recommender.rank(histories, num_beams=20, batch_size=64)
    assert (alone == together).all()
    np.testing.assert_allclose(alone_scores, scores, atol=1e-4)
    assert (np.diff(scores) <= 0).all()
    short = [histories[0][:1]]
    padded = recommender.rank([*short, list(range(MAX_HISTORY))], batch_size=2)[0][:1]
    assert (recommender.rank(short)[0] == padded).all()


def padded_prompts(recommender: Recommender, histories: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    return padded(recommender.prompts(histories), recommender.policy.pad_id, recommender.model.device)


def test_prompts_are_padded_on_the_left_and_end_with_the_begin_marker(recommender: Recommender) -> None:
    ids, mask = padded_prompts(recommender, [[1], [1, 2, 3, 4]])
    assert ids.shape == mask.shape
    assert (ids[:, -1] == recommender.policy.vocabulary.begin_id).all()
    assert mask[1].all()
    assert (mask[0].diff() >= 0).all()
    assert ids[0][mask[0].bool()].tolist() == recommender.prompts([[1]])[0]


def test_only_the_last_items_are_read(recommender: Recommender) -> None:
    long = [7, 7, 7, 3, 20, 30, 40, 5, 6]
    items, scores = recommender.rank([long, long[-MAX_HISTORY:], long[-MAX_HISTORY + 1 :]])
    assert (items[0] == items[1]).all()
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-5)
    assert np.abs(scores[1] - scores[2]).max() > 1e-4, "the item at the edge counts"


def test_scores_are_those_of_every_item_read_by_itself(recommender: Recommender, histories: list[list[int]]) -> None:
    items, scores = recommender.rank(histories[:2], k=N_ITEMS, num_beams=N_ITEMS)
    policy = recommender.policy
    ids, mask = padded_prompts(recommender, histories[:2])
    slow = score_all_items(
        recommender.model,
        policy.trie,
        policy.vocabulary,
        ids,
        mask,
        item_token_ids=policy.prompts.item_token_ids,
    ).numpy()
    assert sorted(items[0]) == sorted(items[1]) == list(range(N_ITEMS))
    np.testing.assert_allclose(np.take_along_axis(slow, items, 1), scores, atol=1e-4)
    np.testing.assert_allclose(np.exp(scores).sum(1), 1, atol=1e-4)


def test_excluded_items_never_appear_and_the_others_keep_their_scores(
    recommender: Recommender, histories: list[list[int]]
) -> None:
    everything, scores = recommender.rank(histories, k=N_ITEMS, num_beams=N_ITEMS)
    few = [list(range(i)) for i in range(len(histories))]
    items, kept = recommender.rank(histories, k=N_ITEMS, num_beams=N_ITEMS, exclude=few, batch_size=7)
    for i, excluded in enumerate(few):
        stay = ~np.isin(everything[i], excluded)
        assert set(items[i, : stay.sum()]) == set(everything[i][stay])
        np.testing.assert_allclose(kept[i, : stay.sum()], scores[i][stay], atol=1e-4)
        assert (items[i, stay.sum() :] == -1).all()
        assert np.isneginf(kept[i, stay.sum() :]).all()


def test_k_and_the_number_of_beams(recommender: Recommender, histories: list[list[int]]) -> None:
    five = recommender.rank(histories[:4], k=5, num_beams=20)[0]
    assert (five == recommender.rank(histories[:4], k=20, num_beams=20)[0][:, :5]).all()
    all_but_three = [list(range(3, N_ITEMS))]
    items, scores = recommender.rank(histories[:1], k=5, num_beams=5, exclude=all_but_three)
    assert sorted(items[0, :3]) == [0, 1, 2]
    assert items[0, 3:].tolist() == [-1, -1]
    assert np.isneginf(scores[0, 3:]).all()
    assert recommender.rank([], k=5)[0].shape == (0, 5)
    with pytest.raises(UserError, match=r"num_beams=4 .* k=5"):
        recommender.rank(histories[:1], k=5, num_beams=4)


def test_given_items_get_the_scores_of_the_ranking(recommender: Recommender, histories: list[list[int]]) -> None:
    items, scores = recommender.rank(histories, k=N_ITEMS, num_beams=N_ITEMS)
    some = items[:, [0, 30, 7, 47, 12]]
    found = recommender.score(histories, some, batch_size=7)
    np.testing.assert_allclose(found, scores[:, [0, 30, 7, 47, 12]], atol=1e-4)
    names = [recommender.items.ids(row.tolist()) for row in some]
    np.testing.assert_allclose(recommender.score(histories, names), found, atol=1e-4)
    np.testing.assert_allclose(np.exp(recommender.score(histories[:2], items[:2])).sum(1), 1, atol=1e-4)
    assert recommender.score([], []).shape == (0, 0)
    for wrong in ([[1, 2]], [[1], [1, 2]], [[1, 1], [1, 2]]):
        with pytest.raises(UserError, match=r"give one for each, all of them equally long, with different items"):
            recommender.score(histories[:2], wrong)
    with pytest.raises(UserError, match=f"item {N_ITEMS} is not in the catalogue"):
        recommender.score(histories[:1], [[N_ITEMS]])


# --- what does not belong together ------------------------------------------------------------------------------


def test_another_base_is_refused(
    adapter: Path, tiny_base: Path, tmp_path: Path, point: Callable[[Path, str], None]
) -> None:
    """The folder of the base model holds other weights now."""
    from transformers import AutoModelForCausalLM

    base, moved = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(tiny_base, base)
    shutil.copytree(adapter, moved)
    trained_on = read_manifest(moved).facts["setting"]["fingerprint"]
    point(moved, str(base))
    assert Recommender.from_pretrained(moved).setting.fingerprint == trained_on  # the same weights elsewhere are fine
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    model.save_pretrained(base)
    with pytest.raises(UserError, match=rf"{trained_on[:12]}.* loaded now has .* train again"):
        Recommender.from_pretrained(moved)


def test_only_a_trained_model_is_loaded(tiny_index: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a index, not a trained model.*recipes/sft\.py"):
        Recommender.from_pretrained(tiny_index)
    with pytest.raises(UserError, match="no artefact"):
        Recommender.from_pretrained(tmp_path)
    damaged = tmp_path / "damaged"
    shutil.copytree(adapter, damaged)
    path = damaged / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors was changed"):
        Recommender.from_pretrained(damaged)


def test_the_whole_catalogue_is_scored_for_few_users_at_a_time(
    recommender: Recommender, histories: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each user of a batch takes as much memory as a batch of a search with 50 beams."""
    seen, inner = [], module.rank

    def watched(policy, model, prompts, how, **more):
        seen.append(how.batch_size)
        return inner(policy, model, prompts, how, **more)

    monkeypatch.setattr(module, "rank", watched)
    monkeypatch.setattr(module, "EXHAUSTIVE_BEAMS", 3 * N_ITEMS)
    few = recommender.rank(histories, k=5, exhaustive=True, batch_size=64)
    monkeypatch.setattr(module, "EXHAUSTIVE_BEAMS", 1)
    one = recommender.rank(histories[:4], k=5, exhaustive=True, batch_size=64)
    recommender.rank(histories[:4], k=5, batch_size=64)
    assert seen == [3, 1, 64]
    np.testing.assert_allclose(one[1], few[1][:4], atol=1e-4)
