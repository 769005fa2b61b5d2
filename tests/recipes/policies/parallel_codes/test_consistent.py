"""Pruned paths against a search that is written path by path and reads every prefix anew."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from reasonrec.recipes.decoding.consistency import Checks, Consistency
from reasonrec.recipes.decoding.search import Found
from reasonrec.recipes.policies.inference import Ranking, rank
from reasonrec.recipes.policies.parallel_codes.consistent import filled
from reasonrec.rewards.consistency import jensen_shannon
from reasonrec.tokenizers.errors import UserError

SIZES, FIRST = (3, 4, 3), (0, 3, 7)
HISTORIES, BARRED = ([0, 3], [5], [1, 2, 7]), ([0, 3], [], [1, 2, 7, 8, 9])
Path = tuple[int, ...]


class Slow:
    """The search of one user, path by path."""

    def __init__(self, made: Any, history: list[int], barred: list[int], rules: Consistency, width: int) -> None:
        self.model, self.rules, self.width = made.model, rules, width
        self.low, self.prompt = made.policy.vocabulary.first_id, made.policy.prompts.direct(history)
        self.columns = made.policy.answers.sets.columns.numpy()
        self.allowed = ~np.isin(np.arange(16), barred)
        self.taken: set[Path] = set()
        self.read: dict[Path, np.ndarray] = {}
        self.pruned = 0

    @torch.no_grad()
    def logits(self, path: Path) -> np.ndarray:
        if path not in self.read:
            ids = torch.tensor([[*self.prompt, *(self.low + column for column in path)]])
            self.read[path] = self.model(input_ids=ids).logits[0, -1, self.low : self.low + 12].double().numpy()
        return self.read[path]

    def children(self, path: Path, score: float) -> list[tuple[float, Path, list[int]]]:
        """What may follow: score, path, and the items below."""
        logits = self.logits(path)
        fits = np.array([all(column in row for column in path) for row in self.columns])
        left = [b for b in range(3) if not any(FIRST[b] <= c < FIRST[b] + SIZES[b] for c in path)]
        parts = {b: logits[FIRST[b] : FIRST[b] + SIZES[b]] for b in left}
        book = max(left, key=lambda b: (parts[b].max() - np.logaddexp.reduce(parts[b]), -b))
        legal = sorted(set(self.columns[fits, book].tolist()))
        total = np.logaddexp.reduce(logits[legal])
        below = {c: np.flatnonzero(fits & (self.columns[:, book] == c)) for c in legal}
        return [
            (score + logits[c] - total, (*path, c), items.tolist())
            for c, items in below.items()
            if self.allowed[items].any()
        ]

    def ends(self, path: Path) -> bool:
        every = self.rules.check_every
        if len(path) % every:
            return False
        before, now = (torch.from_numpy(self.logits(p)[10:]).softmax(0).numpy() for p in (path[:-every], path))
        found = bool(jensen_shannon(before[None], now[None])[0] > self.rules.theta)
        self.pruned += found
        return found

    def rewritten(self, dead: list[Path], scores: dict[Path, float], done: dict[int, float]) -> list[Path]:
        """What comes of paths that ended, all of them a move at a time."""
        goal, lanes = len(dead[0]), [(path, True, 0) for path in dead]
        back = []
        while lanes:
            moved = []
            for path, died, tries in lanes:
                if died and tries == self.rules.retries:
                    continue
                source = path[: max(len(path) - self.rules.rollback, 0)] if died else path
                options = [child for child in self.children(source, scores[source]) if child[1] not in self.taken]
                if not options:
                    moved.append((path, True, tries + died))
                    continue
                score, new, items = max(options)
                self.taken.add(new)
                if len(items) == 1:
                    done[items[0]] = score
                    continue
                scores[new] = score
                moved.append((new, None, tries + died))
            lanes = []
            for path, died, tries in moved:
                ended = self.ends(path) if died is None else died
                if not ended and len(path) == goal:
                    back.append(path)
                else:
                    lanes.append((path, ended, tries))
        return back

    def search(self, k: int) -> list[int]:
        scores: dict[Path, float] = {(): 0.0}
        frontier, done = [()], dict[int, float]()
        while frontier:
            offered = [child for path in frontier for child in self.children(path, scores[path])]
            every = sorted(
                [*offered, *((score, (), [item]) for item, score in done.items())], reverse=True, key=lambda c: c[0]
            )[: self.width]
            self.taken |= {path for _, path, _ in every}
            done = {items[0]: score for score, _, items in every if len(items) == 1}
            best = sorted(done.values(), reverse=True)
            least = best[k - 1] if len(best) >= k else -np.inf
            new = [(path, score) for score, path, items in every if len(items) > 1 and score > least]
            scores.update(new)
            dead = [path for path, _ in new if self.ends(path)]
            frontier = [path for path, _ in new if path not in dead]
            if dead:
                frontier += self.rewritten(dead, scores, done)
        return sorted(done, key=lambda item: -done[item])[:k]


def found_by(made: Any, rules: Consistency, k: int, width: int) -> tuple[Any, Checks]:
    checks, answers = Checks(), made.policy.answers
    made.policy.answers = answers.checked(rules, checks)
    try:
        prompts = [made.policy.prompts.direct(history) for history in HISTORIES]
        return rank(made.policy, made.model, prompts, Ranking(k, width), exclude=BARRED), checks
    finally:
        made.policy.answers = answers


@pytest.mark.parametrize("theta", [0.0, 0.01, 0.05])
@pytest.mark.parametrize(("every", "back", "retries"), [(1, 1, 0), (1, 1, 2), (1, 2, 2), (1, 1, 9), (2, 2, 3)])
def test_the_list_is_that_of_a_search_path_by_path(make_sets, theta, every, back, retries):
    made = make_sets()
    rules = Consistency(theta, every, back, retries, fallback="none")
    for k, width in ((4, 4), (3, 6)):
        found, checks = found_by(made, rules, k, width)
        slow = [Slow(made, h, b, rules, width) for h, b in zip(HISTORIES, BARRED, strict=True)]
        expected = [one.search(k) for one in slow]
        assert [[item for item in row if item >= 0] for row in found.items.tolist()] == expected
        assert checks.pruned == sum(one.pruned for one in slow)
        assert checks.users == 3


def test_theta_1_prunes_nothing_and_changes_no_bit(make_sets):
    made = make_sets()
    plain = rank(
        made.policy, made.model, [made.policy.prompts.direct(h) for h in HISTORIES], Ranking(6, 6), exclude=BARRED
    )
    found, checks = found_by(made, Consistency(1), 6, 6)
    assert (found.items == plain.items).all()
    assert (found.scores == plain.scores).all()
    assert (found.proven == plain.proven).all()
    assert (checks.pruned, checks.back, checks.again, checks.unchecked) == (0, 0, 0, 0)
    assert 0 < checks.compared <= checks.read


def test_theta_0_prunes_every_path_and_the_unchecked_list_is_kept(make_sets):
    made = make_sets()
    plain, _ = found_by(made, Consistency(1), 6, 6)
    found, checks = found_by(made, Consistency(0, retries=0), 6, 6)
    assert checks.pruned == checks.compared > 0
    assert checks.unchecked > 0
    assert not found.proven.any()
    if checks.dead == 3:
        assert (found.items == plain.items).all()
    assert (found.items >= 0).all(), "no place is left empty"
    assert all(len(set(row)) == 6 for row in found.items.tolist())
    empty, counted = found_by(made, Consistency(0, retries=0, fallback="none"), 6, 6)
    assert (empty.items < 0).all(1).sum() == counted.dead == checks.dead
    assert counted.unchecked == 0


def test_items_keep_their_scores(make_sets):
    made = make_sets()
    everything = rank(made.policy, made.model, [made.policy.prompts.direct(h) for h in HISTORIES], Ranking(16, 16))
    found, _ = found_by(made, Consistency(0.01), 5, 5)
    for row in range(3):
        known = dict(zip(everything.items[row].tolist(), everything.scores[row].tolist(), strict=True))
        np.testing.assert_allclose(found.scores[row], [known[item] for item in found.items[row].tolist()], atol=1e-4)


@pytest.mark.parametrize("options", [{"law": "free"}, {"law": "ordered"}])
def test_other_laws_are_checked_too(make_sets, options):
    made = make_sets(**options)
    found, checks = found_by(made, Consistency(0.01), 5, 8)
    assert checks.pruned > 0
    assert all(len(set(row)) == 5 for row in found.items.tolist())
    assert not np.isin(found.items[2], BARRED[2]).any()


def test_lists_are_filled_from_others():
    items = torch.tensor([[3, -1, -1], [-1, -1, -1], [4, -1, -1]])
    found = Found(items, torch.where(items < 0, -torch.inf, -1.0), torch.zeros(3, dtype=torch.bool))
    other = torch.tensor([[5, 3, 6], [1, 2, -1], [0, 1, 2]])
    made = filled(found, Found(other, torch.full((3, 3), -2.0), found.proven), torch.tensor([True, True, False]))
    assert made.items.tolist() == [[3, 5, 6], [1, 2, -1], [4, -1, -1]]
    assert made.scores.tolist() == [[-1, -2, -2], [-2, -2, -torch.inf], [-1, -torch.inf, -torch.inf]]


def test_rules_that_do_not_fit_are_refused(make_sets):
    answers = make_sets().policy.answers
    with pytest.raises(UserError, match=r"check_every=3 compares nothing: an item has 3 codes .* choose 1 to 2"):
        answers.checked(Consistency(0.06, check_every=3), Checks())
    averaged = make_sets(law="ordered", orders=2).policy.answers
    with pytest.raises(UserError, match=r"theta=0\.06 checks the paths of one search, but .* averages orders=2"):
        averaged.checked(Consistency(0.06), Checks())
    made = make_sets()
    made.policy.answers = made.policy.answers.checked(Consistency(0.06), Checks())
    with pytest.raises(UserError, match="exact: false"):
        rank(made.policy, made.model, [made.policy.prompts.direct([1])], Ranking(3, 3, exact=True))
