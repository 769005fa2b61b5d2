"""The pool at the nodes of the trie, against a dictionary of prefixes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reasonrec.recipes.decoding.prefix import read
from reasonrec.recipes.decoding.prior import Prior, Tree, without
from reasonrec.recipes.decoding.score import score_items
from reasonrec.recipes.decoding.search import search, search_room

WEIGHTS = np.array([[0.7, 1.3, 0.2], [0.5, 0.0, 2.0], [0.3, 0.9, 1.1]])  # model and two experts, three levels


def by_hand(codes: np.ndarray, voices: np.ndarray, weights: np.ndarray, excluded: set[int]) -> np.ndarray:
    """Pooled log-probability of each item: (items, levels), (voices, items) and (voices, levels).

    The first voice keeps what it gives to excluded items, as the model does.
    """
    left = [item for item in range(len(codes)) if item not in excluded]
    paths = [tuple(int(code) for code in row if code >= 0) for row in codes]
    result = np.full(len(codes), -np.inf)

    def mass(voice: int, prefix: tuple[int, ...]) -> float:
        among = range(len(codes)) if voice == 0 else left
        return sum(np.exp(voices[voice, item]) for item in among if paths[item][: len(prefix)] == prefix)

    for item in left:
        total = 0.0
        for level in range(len(paths[item])):
            above = paths[item][:level]
            children = {paths[other][: level + 1] for other in left if paths[other][:level] == above}
            mixed = {
                child: sum(weights[voice, level] * np.log(mass(voice, child)) for voice in range(len(voices)))
                for child in children
            }
            total += mixed[paths[item][: level + 1]] - np.logaddexp.reduce(list(mixed.values()))
        result[item] = total
    return result


@pytest.fixture(scope="module")
def tree(world) -> Tree:
    return Tree(world.trie.paths(torch.arange(world.n_items)), world.trie.n_nodes)


def drawn(n_items: int, n: int, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(scale=3, size=(n, n_items))
    return (noise - np.logaddexp.reduce(noise, axis=1, keepdims=True)).astype(np.float32)


def prior(tree: Tree, experts: np.ndarray, excluded: list[list[int]] | None) -> Prior:
    """(experts, users, items) to what the search takes."""
    masses = [tree.log_mass(torch.from_numpy(without(expert, excluded))) for expert in experts]
    weights = torch.from_numpy(WEIGHTS[1:]).float()[:, tree.level]
    gone = masses[0] == -torch.inf
    scores = sum(w * mass.masked_fill(gone, 0) for w, mass in zip(weights, masses, strict=True))
    return Prior(scores.masked_fill(gone, -torch.inf), torch.from_numpy(WEIGHTS[0]).float())


EXCLUDED = [[3], [], [0, 1, 2, 7, 11, 30], list(range(5, 38))]


@pytest.mark.parametrize("excluded", [None, EXCLUDED])
@pytest.mark.parametrize(("k", "beams", "exact"), [(40, 40, False), (5, 5, True)])
def test_the_search_ranks_as_the_pool_does_by_hand(world, tree, excluded, k, beams, exact):
    experts = np.stack([drawn(world.n_items, 4, seed) for seed in (1, 2)])
    options = prior(tree, experts, excluded)
    ids, mask = world.batch(world.prompts)
    room = search_room(world.trie, world.n_items)
    prefix = read(world.model, ids, mask, room=room, ahead=world.trie.depth)
    barred = None if excluded is None else world.trie.excluded_ranks(excluded)
    found = search(
        world.model,
        world.trie,
        world.vocabulary,
        prefix,
        k=k,
        num_beams=beams,
        excluded=barred,
        exact=exact,
        prior=options,
    )
    items = torch.arange(world.n_items).expand(4, -1)
    scored = score_items(world.model, world.trie, world.vocabulary, prefix, items, prior=options)
    for user, prompt in enumerate(world.prompts):
        voices = np.stack([world.brute_force(prompt), *experts[:, user]])
        gone = set(excluded[user]) if excluded else set()
        want = by_hand(world.codes, voices, WEIGHTS, gone)
        assert np.logaddexp.reduce(want) == pytest.approx(0, abs=1e-6), "one distribution over what may be had"
        np.testing.assert_allclose(scored[user], want, atol=1e-3)
        best = np.argsort(-want, kind="stable")[: min(k, world.n_items - len(gone))]
        assert found.items[user][: len(best)].tolist() == best.tolist()
        assert (found.items[user][len(best) :] == -1).all()
        np.testing.assert_allclose(found.scores[user][: len(best)], want[best], atol=1e-3)
    if exact:
        assert found.proven.all()


def test_without_a_model_the_same_in_one_go(world, tree):
    experts = drawn(world.n_items, 4, 1)[None]
    mass = tree.log_mass(torch.from_numpy(without(experts[0], EXCLUDED)))
    found = tree.item_log_probs(mass)
    for user, gone in enumerate(EXCLUDED):
        left = np.setdiff1d(np.arange(world.n_items), gone)
        want = np.full(world.n_items, -np.inf)
        want[left] = experts[0, user, left] - np.logaddexp.reduce(experts[0, user, left])
        np.testing.assert_allclose(found[user], want, atol=1e-4, err_msg="weights of 1 give the expert back")


@given(st.lists(st.floats(-500, 0), min_size=4, max_size=4), st.sets(st.integers(0, 3), max_size=3))
def test_masses_by_hand(log_probs, excluded):
    tree = Tree(torch.tensor([[1, 3], [1, 4], [2, -1], [5, 6]]), 7)
    given_ = without(np.array([log_probs], dtype=np.float32), [np.array(sorted(excluded), dtype=np.int64)])
    mass = tree.log_mass(torch.from_numpy(given_))[0].double().numpy()
    chances = np.where(
        np.isin(np.arange(4), list(excluded)), 0.0, np.exp(np.array(log_probs, dtype=np.float32), dtype=np.float64)
    )
    with np.errstate(divide="ignore"):
        want = np.log([chances[0] + chances[1], chances[2], chances[0], chances[1], chances[3], chances[3]])
    np.testing.assert_allclose(mass[1:], want, rtol=1e-5, atol=1e-4)
    items = tree.item_log_probs(tree.log_mass(torch.from_numpy(given_)))[0].double()
    assert float(items.exp().sum()) == pytest.approx(1, abs=1e-5)
    assert [item for item in range(4) if items[item] == -torch.inf] == sorted(excluded)


def test_weights_of_one_and_nothing_leave_the_model_as_it_is():
    log_probs = torch.tensor([[[-0.5, -1.5, -2.0]]]).log_softmax(-1)
    child = torch.tensor([[[1, 2, -1]]])
    silent = Prior(torch.zeros(1, 4), torch.ones(1))
    found = silent.pooled(log_probs, child, torch.zeros(1, 1, dtype=torch.int64))
    torch.testing.assert_close(found[..., :2], log_probs[..., :2].log_softmax(-1))
    assert found[0, 0, 2] == -torch.inf
