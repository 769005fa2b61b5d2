import itertools

import numpy as np
import pytest

from reasonrec.data_gen.readers.synthetic import SyntheticWorld, WorldConfig, make_synthetic
from reasonrec.data_gen.schema import count_targets
from reasonrec.tokenizers.errors import UserError

# Two clusters of two items, two personas.
TINY = SyntheticWorld(
    preferences=np.array([[0.8, 0.2, 0.6, 0.4], [0.3, 0.7, 0.5, 0.5]]),
    transitions=np.array([[0.9, 0.1], [0.25, 0.75]]),
    cluster_of=np.array([0, 0, 1, 1]),
    promoted=np.array([3]),
    ratings=np.array([[1.0, 0.5, 0.0, 0.2], [0.1, 0.9, 1.0, 0.3]]),
)


@pytest.fixture(scope="module")
def world() -> SyntheticWorld:
    return SyntheticWorld.build(WorldConfig())


@pytest.fixture(scope="module")
def histories() -> list[list[int]]:
    return make_synthetic(WorldConfig(), 4000, 2000).test["history"].to_list()


def test_tiny_posterior_by_hand() -> None:
    # Persona 0: .8 * .4 = .32; persona 1: .3 * .5 = .15.
    q = 0.32 / 0.47
    assert TINY.posterior([0, 3]) == pytest.approx([q, 1 - q])
    assert TINY.posterior([]) == pytest.approx([0.5, 0.5])
    # The last item is of cluster 1, so the next cluster is 0 with .25 and 1 with .75.
    expected = [0.25 * (q * 0.8 + (1 - q) * 0.3), 0.25 * (q * 0.2 + (1 - q) * 0.7)]
    expected += [0.75 * (q * 0.6 + (1 - q) * 0.5), 0.75 * (q * 0.4 + (1 - q) * 0.5)]
    assert TINY.probabilities([0, 3]) == pytest.approx(expected)
    with pytest.raises(ValueError, match="at least one item"):
        TINY.probabilities([])


def test_tiny_posterior_by_enumeration() -> None:
    """P(next | history) from the joint probability of whole sequences, persona by persona."""

    def joint(sequence: list[int]) -> float:
        total = 0.0
        for persona in range(2):
            chance = 0.5 * 0.5 * TINY.preferences[persona, sequence[0]]
            for a, b in itertools.pairwise(sequence):
                chance *= TINY.transitions[TINY.cluster_of[a], TINY.cluster_of[b]] * TINY.preferences[persona, b]
            total += chance
        return total

    history = [1, 2, 2, 0]
    assert TINY.probabilities(history) == pytest.approx([joint([*history, y]) / joint(history) for y in range(4)])


def test_values_by_hand() -> None:
    q = 0.32 / 0.47
    expected = [0.25 * (q * 0.8 * 1.0 + (1 - q) * 0.3 * 0.1), 0.25 * (q * 0.2 * 0.5 + (1 - q) * 0.7 * 0.9)]
    expected += [0.75 * (q * 0.6 * 0.0 + (1 - q) * 0.5 * 1.0), 0.75 * (q * 0.4 * 0.2 + (1 - q) * 0.5 * 0.3)]
    assert TINY.values([0, 3]) == pytest.approx(expected)
    found = TINY.expected_value(np.array([[2, 0, 1, -1], [3, -1, 0, 1]]), [[0, 3], [0, 3]], k=2)
    assert found == pytest.approx((expected[2] + expected[0] + expected[3]) / 2)
    assert TINY.best_value([[0, 3]], k=2) == pytest.approx(sum(sorted(expected)[-2:]))


def test_values_are_the_mean_rating_of_drawn_choices(world: SyntheticWorld) -> None:
    """Users with one history, continued by chance: what their persona gives the next item, if a list holds it."""
    rng = np.random.default_rng(0)
    users, personas = world.sample(60_000, rng)
    worth = np.array([world.ratings[persona][items[-1]] for items, persona in zip(users, personas, strict=True)])
    lists = [np.argsort(-world.values(items[:-1]))[:10] for items in users[:6000]]
    earned = [w * (items[-1] in chosen) for w, items, chosen in zip(worth, users, lists, strict=False)]
    histories = [items[:-1].tolist() for items in users[:6000]]
    assert np.mean(earned) == pytest.approx(world.best_value(histories), abs=0.02)


def test_choices_are_rated_by_the_user_who_made_them() -> None:
    for bias in (0.0, 0.3):
        train = make_synthetic(WorldConfig(), 20, 2, bias).train
        assert (train["ratings"].list.len() == train["items"].list.len()).all()
        chosen = train["items"].to_list()
        if bias:
            chosen = [[*items[:-1], clean] for items, clean in zip(chosen, train["clean_target"], strict=True)]
        world = SyntheticWorld.build(WorldConfig())
        for user in set(train["user"].to_list()):
            rows = [i for i, owner in enumerate(train["user"]) if owner == user]
            fits = [
                all(
                    np.allclose(world.ratings[persona][chosen[i]], train["ratings"][i].to_numpy(), atol=1e-6)
                    for i in rows
                )
                for persona in range(len(world.ratings))
            ]
            assert sum(fits) == 1


def test_expected_metrics_by_hand() -> None:
    p = TINY.probabilities([0, 3])
    hr, ndcg = TINY.expected_metrics(np.array([[2, 0, -1]]), [[0, 3]], k=3)
    assert hr == pytest.approx(p[2] + p[0])
    assert ndcg == pytest.approx(p[2] + p[0] / np.log2(3))
    assert TINY.expected_metrics(np.array([[2, 0, 1]]), [[0, 3]], k=1)[0] == pytest.approx(p[2])
    best = np.sort(p)[::-1]
    assert TINY.optimum([[0, 3]], k=2) == pytest.approx((best[:2].sum(), best[0] + best[1] / np.log2(3)))


def test_biased_optimum_learns_the_mixture_and_is_scored_clean() -> None:
    # Almost only the promoted item 3 is shown, so it comes first though another is likelier.
    p = TINY.probabilities([0])
    assert TINY.biased_probabilities([0], 0.9).sum() == pytest.approx(1)
    assert TINY.optimum([[0]], k=1, exposure_bias=0.9)[0] == pytest.approx(p[3])


def test_probabilities_sum_to_one(world: SyntheticWorld, histories: list[list[int]]) -> None:
    for history in histories[:50]:
        assert world.probabilities(history).sum() == pytest.approx(1)


def test_measured_levels(world: SyntheticWorld, histories: list[list[int]]) -> None:
    # Other draws of the world move these by about .01.
    assert world.optimum(histories) == pytest.approx((0.567, 0.348), abs=0.015)
    assert world.optimum(histories, exposure_bias=0.3) == pytest.approx((0.447, 0.307), abs=0.015)
    tables = make_synthetic(WorldConfig(), 4000, 2000)
    popular = np.argsort(-count_targets(tables.train, world.n_items), kind="stable")[:10]
    level = world.expected_metrics(np.tile(popular, (len(histories), 1)), histories)
    assert level == pytest.approx((0.071, 0.033), abs=0.006)
    blind = [
        np.argsort(-(world.transitions[world.cluster_of[h[-1]]][world.cluster_of] * world.preferences.mean(axis=0)))
        for h in histories
    ]
    assert world.expected_metrics(np.stack(blind)[:, :10], histories) == pytest.approx((0.397, 0.196), abs=0.015)


def test_expected_metrics_agree_with_drawn_targets(world: SyntheticWorld) -> None:
    test = make_synthetic(WorldConfig(), 1, 2000).test
    histories = test["history"].to_list()
    best = np.stack([np.argsort(-world.probabilities(history))[:10] for history in histories])
    hits = (best == test["target"].to_numpy()[:, None]).any(axis=1).mean()
    assert hits == pytest.approx(world.optimum(histories)[0], abs=4 * 0.011)


def test_dataset_layout_and_rebuilt_world(world: SyntheticWorld) -> None:
    tables = make_synthetic(WorldConfig(), 50, 20)
    assert (tables.train.height, tables.valid.height, tables.test.height) == (50, 20, 20)
    assert tables.train["items"].list.len().is_between(6, 12).all()
    users = [set(frame["user"].to_list()) for frame in (tables.train, tables.valid, tables.test)]
    assert not users[0] & users[1]
    assert not users[1] & users[2]
    assert tables.items["title"][0] == "small oak lamp"
    assert tables.items["title"].is_unique().all()
    assert tables.items["item_id"][32 + 4 + 3] == "1-1-3"
    rebuilt = SyntheticWorld.from_facts(tables.facts)
    assert np.array_equal(rebuilt.preferences, world.preferences)
    with pytest.raises(UserError, match="not synthetic"):
        SyntheticWorld.from_facts({"name": "demo"})


def test_exposure_bias_touches_supervised_targets_only(world: SyntheticWorld) -> None:
    clean, biased = (make_synthetic(WorldConfig(), 300, 5, eta) for eta in (0.0, 0.3))
    assert biased.test.equals(clean.test)
    whole = dict(clean.train.select("user", "items").iter_rows())
    shown, replaced = 0, 0
    columns = ("user", "items", "first_target", "clean_target")
    for user, items, first_target, target in biased.train.select(columns).iter_rows():
        end = len(items) - 1
        assert first_target == end
        assert items[:end] == whole[user][:end]
        assert target == whole[user][end]
        shown += 1
        if items[end] != target:
            replaced += 1
            assert items[end] in world.promoted
    assert shown == sum(len(items) - 1 for items in whole.values())
    assert replaced / shown == pytest.approx(0.3, abs=0.04)


def test_some_items_are_disliked() -> None:
    even, harsh = (SyntheticWorld.build(WorldConfig(seed=3, disliked=share)) for share in (0.0, 0.7))
    tenth = np.isclose(harsh.ratings, even.ratings / 10)
    assert tenth.mean() == pytest.approx(0.7, abs=0.02)
    assert np.array_equal(harsh.ratings[~tenth], even.ratings[~tenth])
    assert np.array_equal(harsh.preferences, even.preferences)
