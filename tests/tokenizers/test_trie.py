"""The trie against a plain dictionary of prefixes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonrec.tokenizers.errors import UserError
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
        assert int(trie.only_item(torch.tensor(node))) == item
        assert bool(trie.is_leaf(torch.tensor(node)))
    ends = trie.only_item(trie.is_leaf(torch.arange(trie.n_nodes)).nonzero()[:, 0])
    assert sorted(ends.tolist()) == list(range(len(tuples)))
    assert trie.rank_item[trie.leaf_rank.long()].tolist() == list(range(len(tuples)))


@settings(max_examples=100, deadline=None)
@given(seeds)
def test_paths_and_what_is_known_of_each_level_agree_with_brute_force(rng):
    tuples, sizes = random_tuples(rng)
    trie = Trie.from_codes(as_array(tuples, len(sizes)), sizes)
    paths = [as_columns(codes, sizes) for codes in tuples]
    below: dict[tuple[int, ...], list[int]] = {}
    for item, path in enumerate(paths):
        for n in range(len(path) + 1):
            below.setdefault(path[:n], []).append(item)
    items = torch.arange(-1, len(tuples)).reshape(1, -1)
    found = trie.paths(items)
    assert found.shape == (1, len(tuples) + 1, trie.depth)
    assert (found[0, 0] == -1).all()
    for item, path in enumerate(paths):
        nodes = [walk(trie, path[: n + 1]) for n in range(len(path))]
        assert found[0, item + 1].tolist() == nodes + [-1] * (trie.depth - len(path))
    for prefix, at in below.items():
        node = torch.tensor(walk(trie, prefix))
        assert int(trie.only_item(node)) == (at[0] if len(at) == 1 else -1)
        assert bool(trie.is_leaf(node)) == (prefix in paths)
    for level in range(trie.depth):
        ends = [prefix for prefix in below if len(prefix) == level + 1]
        assert trie.widths[level] == max(sum(e[:-1] == up for e in ends) for up in {e[:-1] for e in ends})
        assert trie.branching[level] == sum(len(below[e]) > 1 for e in ends)
    assert int(trie.only_item(torch.tensor(-1))) == -1
    assert not bool(trie.is_leaf(torch.tensor(-1)))


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
    assert child.shape == column.shape == (1, trie.n_nodes + 1, max(1, *trie.widths))
    for i, node in enumerate(nodes[0].tolist()):
        real = child[0, i] >= 0
        assert real.tolist() == sorted(real.tolist(), reverse=True), "padding comes last"
        assert (column[0, i][~real] == 0).all(), "padding has to be a valid place to gather from"
        found = {c: int(trie.child(*map(torch.tensor, (node, c)))) for c in range(trie.n_columns)}
        legal = [c for c in found if found[c] >= 0]  # of no node, none
        assert column[0, i][real].tolist() == legal
        assert child[0, i][real].tolist() == [found[c] for c in legal]
        assert legal or node < 0 or bool(trie.is_leaf(torch.tensor(node))), "a node without children is a leaf"
        assert not (legal and node >= 0 and bool(trie.is_leaf(torch.tensor(node)))), (
            "prefix-free: no item above another"
        )


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
    assert torch.equal(straight.edge_keys, shuffled.edge_keys)
    assert torch.equal(straight.offsets, shuffled.offsets)
    assert torch.equal(torch.from_numpy(order)[shuffled.rank_item.long()], straight.rank_item.long())


def test_a_small_trie_by_hand():
    trie = Trie.from_codes(np.array([[1, 0], [0, -1], [1, 2]]), [2, 3])
    # Nodes breadth first: root, (0), (1), (1, 0), (1, 2); columns of level 1 begin at 2.
    assert trie.offsets.tolist() == [0, 2, 2, 4, 4, 4]
    assert trie.edge_keys.tolist() == [0, 1, 2 * 5 + 2, 2 * 5 + 4]
    assert trie.only_item(torch.arange(5)).tolist() == [-1, 1, -1, 0, 2]
    assert trie.is_leaf(torch.arange(5)).tolist() == [False, True, False, True, True]
    assert trie.rank_item.tolist() == [1, 0, 2]
    assert trie.leaf_rank.tolist() == [1, 0, 2]
    assert trie.leaf_begin.tolist() == [0, 0, 1, 1, 2]
    assert trie.leaf_end.tolist() == [3, 1, 3, 2, 3]
    assert (trie.widths, trie.branching) == ((2, 2), (1, 0))
    moved = trie.to("cpu")
    assert torch.equal(moved.edge_keys, trie.edge_keys)
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


def test_codes_too_many_for_one_sort_key_are_sorted_by_column():
    sizes = [2**20] * 4  # the product does not fit into 64 bits
    codes = np.random.default_rng(0).integers(0, 3, size=(60, 4))
    codes = np.unique(codes, axis=0)[::-1]
    small = Trie.from_codes(codes, [3] * 4)
    large = Trie.from_codes(codes, sizes)
    assert torch.equal(small.rank_item, large.rank_item)
    assert torch.equal(small.offsets, large.offsets)


def test_excluding_an_unknown_item_is_an_error():
    trie = Trie.from_codes(np.array([[0], [1]]), [2])
    for bad in (-1, 2):
        with pytest.raises(UserError, match=f"excluded item {bad} "):
            trie.excluded_ranks([[0], [bad]])


@pytest.mark.slow
def test_a_million_items_stay_small():
    n = 1_000_000
    key = np.random.default_rng(0).choice(2**24, size=n, replace=False)
    codes = np.stack([key >> 16, (key >> 8) & 255, key & 255], 1).astype(np.int32)
    trie = Trie.from_codes(codes, (256, 256, 256))
    assert trie.n_bytes <= 150e6
    items = torch.arange(0, n, 9973)
    assert torch.equal(trie.only_item(trie.paths(items)[:, -1]), items)
