"""The trie against a plain dictionary of prefixes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonrec.tokenizers.trie import Trie

Codes = list[tuple[int, ...]]


def random_tuples(rng: np.random.Generator) -> tuple[Codes, list[int]]:
    """Unique, prefix-free tuples of different lengths in random order, and the level sizes."""
    sizes = rng.integers(1, 6, size=int(rng.integers(1, 5))).tolist()

    def grow(prefix: tuple[int, ...]) -> Codes:
        if len(prefix) == len(sizes) or (prefix and rng.random() < 0.3):
            return [prefix]
        size = sizes[len(prefix)]
        chosen = rng.choice(size, size=int(rng.integers(1, size + 1)), replace=False)
        return [leaf for code in chosen.tolist() for leaf in grow((*prefix, code))]

    leaves = grow(())
    return [leaves[i] for i in rng.permutation(len(leaves))], sizes


def as_array(tuples: Codes, n_levels: int) -> np.ndarray:
    return np.array([[*codes, *[-1] * (n_levels - len(codes))] for codes in tuples])


def as_columns(codes: tuple[int, ...], sizes: list[int]) -> tuple[int, ...]:
    return tuple(code + sum(sizes[:level]) for level, code in enumerate(codes))


def walk(trie: Trie, columns: tuple[int, ...]) -> int:
    node = torch.tensor(0)
    for column in columns:
        node = trie.child(node, torch.tensor(column))
    return int(node)


seeds = st.integers(0, 2**32 - 1).map(np.random.default_rng)


@settings(max_examples=150, deadline=None)
@given(seeds)
def test_every_item_ends_at_its_own_leaf_and_nothing_else_exists(rng):
    tuples, sizes = random_tuples(rng)
    trie = Trie.from_codes(as_array(tuples, len(sizes)), sizes)
    prefixes = {as_columns(codes, sizes)[:n] for codes in tuples for n in range(len(codes) + 1)}

    assert trie.n_items == len(tuples)
    assert trie.n_nodes == len(prefixes)
    assert trie.n_columns == sum(sizes)
    assert trie.depth == max(map(len, tuples))
    for item, codes in enumerate(tuples):
        node = walk(trie, as_columns(codes, sizes))
        assert int(trie.leaf_item[node]) == item
    assert sorted(trie.leaf_item[trie.leaf_item >= 0].tolist()) == list(range(len(tuples)))


@settings(max_examples=100, deadline=None)
@given(seeds)
def test_child_of_every_node_and_column_agrees_with_a_dictionary(rng):
    tuples, sizes = random_tuples(rng)
    trie = Trie.from_codes(as_array(tuples, len(sizes)), sizes)
    prefixes = {as_columns(codes, sizes)[:n] for codes in tuples for n in range(len(codes) + 1)}
    node_of = {prefix: walk(trie, prefix) for prefix in prefixes}
    assert sorted(node_of.values()) == list(range(trie.n_nodes))
    columns = list(range(-3, trie.n_columns + 3))
    for prefix, node in node_of.items():
        found = trie.child(torch.full((len(columns),), node), torch.tensor(columns)).tolist()
        assert found == [node_of.get((*prefix, column), -1) for column in columns]
    # No node has no children, whatever the column.
    assert (trie.child(torch.full((len(columns),), -1), torch.tensor(columns)) == -1).all()


@settings(max_examples=100, deadline=None)
@given(seeds)
def test_children_are_what_child_finds_ascending_and_padded(rng):
    tuples, sizes = random_tuples(rng)
    trie = Trie.from_codes(as_array(tuples, len(sizes)), sizes)
    nodes = torch.arange(-1, trie.n_nodes).reshape(1, -1)
    child, column = trie.children(nodes)
    assert child.shape == column.shape == (1, trie.n_nodes + 1, max(1, trie.max_branching))
    for i, node in enumerate(nodes[0].tolist()):
        real = child[0, i] >= 0
        assert real.tolist() == sorted(real.tolist(), reverse=True), "padding comes last"
        assert (column[0, i][~real] == 0).all(), "padding has to be a valid place to gather from"
        found = {c: int(trie.child(*map(torch.tensor, (node, c)))) for c in range(trie.n_columns)}
        legal = [c for c in found if found[c] >= 0]  # of no node, none
        assert column[0, i][real].tolist() == legal
        assert child[0, i][real].tolist() == [found[c] for c in legal]
        assert legal or node < 0 or int(trie.leaf_item[node]) >= 0, "a node without children is a leaf"
        assert not (legal and node >= 0 and int(trie.leaf_item[node]) >= 0), "prefix-free: no item above another"


@settings(max_examples=100, deadline=None)
@given(seeds)
def test_items_below_a_node_have_consecutive_leaf_ranks(rng):
    tuples, sizes = random_tuples(rng)
    trie = Trie.from_codes(as_array(tuples, len(sizes)), sizes)
    assert sorted(trie.leaf_rank.tolist()) == list(range(trie.n_items))
    paths = [as_columns(codes, sizes) for codes in tuples]
    for prefix in {path[:n] for path in paths for n in range(len(path) + 1)}:
        node = walk(trie, prefix)
        below = [int(trie.leaf_rank[i]) for i, path in enumerate(paths) if path[: len(prefix)] == prefix]
        assert sorted(below) == list(range(int(trie.leaf_begin[node]), int(trie.leaf_end[node])))


@settings(max_examples=150, deadline=None)
@given(seeds)
def test_allowed_is_brute_force_over_the_items_below(rng):
    tuples, sizes = random_tuples(rng)
    trie = Trie.from_codes(as_array(tuples, len(sizes)), sizes)
    users = 4
    # With repetitions, as a history has them; one user excludes nothing, one everything.
    exclude = [rng.integers(0, trie.n_items, size=int(rng.integers(0, 2 * trie.n_items))) for _ in range(users - 2)]
    exclude = [*exclude, np.zeros(0, dtype=np.int64), rng.permutation(trie.n_items)]
    node = torch.from_numpy(rng.integers(-1, trie.n_nodes, size=(users, 3, 2)))
    allowed = trie.allowed(node, trie.excluded_ranks(exclude))
    item_of_rank = torch.empty(trie.n_items, dtype=torch.int64)
    item_of_rank[trie.leaf_rank] = torch.arange(trie.n_items)
    for user in range(users):
        for n, is_allowed in zip(node[user].flatten().tolist(), allowed[user].flatten().tolist(), strict=True):
            below = set() if n < 0 else set(item_of_rank[int(trie.leaf_begin[n]) : int(trie.leaf_end[n])].tolist())
            assert is_allowed == bool(below - set(exclude[user].tolist()))
    assert allowed.shape == node.shape
    assert torch.equal(trie.allowed(node, None), node >= 0)


def test_nothing_excluded_is_none():
    trie = Trie.from_codes(np.array([[0], [1]]), [2])
    assert trie.excluded_ranks([]) is None
    assert trie.excluded_ranks([[], []]) is None


def test_the_order_of_the_items_only_renames_the_leaves():
    rng = np.random.default_rng(5)
    codes = as_array([(0, 0), (0, 1), (1, 0, 0), (1, 0, 1), (2, 1)], 3)
    order = rng.permutation(5)
    straight, shuffled = Trie.from_codes(codes, [3, 2, 2]), Trie.from_codes(codes[order], [3, 2, 2])
    assert torch.equal(straight.columns, shuffled.columns)
    assert torch.equal(straight.offsets, shuffled.offsets)
    leaf = shuffled.leaf_item
    assert torch.equal(torch.where(leaf >= 0, torch.from_numpy(order)[leaf.clamp(min=0)], -1), straight.leaf_item)


def test_a_small_trie_by_hand():
    trie = Trie.from_codes(np.array([[1, 0], [0, -1], [1, 2]]), [2, 3])
    # Nodes breadth first: root, (0), (1), (1, 0), (1, 2); columns of level 1 begin at 2.
    assert trie.offsets.tolist() == [0, 2, 2, 4, 4, 4]
    assert trie.columns.tolist() == [0, 1, 2, 4]
    assert trie.leaf_item.tolist() == [-1, 1, -1, 0, 2]
    assert trie.leaf_rank.tolist() == [1, 0, 2]
    assert trie.leaf_begin.tolist() == [0, 0, 1, 1, 2]
    assert trie.leaf_end.tolist() == [3, 1, 3, 2, 3]
    assert trie.max_branching == 2
    moved = trie.to("cpu")
    assert torch.equal(moved.columns, trie.columns)
    assert moved.n_columns == 5


def test_a_level_without_codes_and_a_catalogue_of_one():
    trie = Trie.from_codes(np.array([[3, -1]]), [4, 0])
    assert (trie.n_items, trie.n_nodes, trie.n_columns, trie.depth) == (1, 2, 4, 1)
    assert trie.child(torch.tensor([0, 0, 1]), torch.tensor([3, 2, 3])).tolist() == [1, -1, -1]


@pytest.mark.parametrize(
    ("codes", "why"),
    [
        ([[0, 1], [0, 1]], "unique"),
        ([[0, -1], [1, 0], [0, -1]], "unique"),
        ([[0, -1], [0, 1]], "prefix-free"),
        ([[0, 1], [1, 1], [0, -1]], "prefix-free"),
        ([[2, 0]], "size of its level"),
        ([[0, 2]], "size of its level"),
        ([[0, -2]], "-1"),
        ([[-1, 0]], "-1"),
        ([[0, 0], [-1, -1]], "-1"),
        (np.zeros((0, 2), dtype=int), "no item"),
    ],
)
def test_codes_that_break_the_contract_raise(codes, why):
    with pytest.raises(ValueError, match=why):
        Trie.from_codes(np.array(codes), [2, 2])


def test_a_code_behind_the_end_of_an_item_raises():
    with pytest.raises(ValueError, match="-1"):
        Trie.from_codes(np.array([[0, -1, 1], [1, 0, 0]]), [2, 2, 2])
