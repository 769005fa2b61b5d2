import json

import numpy as np
import pytest

from reasonrec.tokenizers.health import first_category, format_report, health_report
from reasonrec.tokenizers.index import build_index

# Six items in two levels; items 0, 1 and 2, 3 collide.
CODES = np.array([[0, 0], [0, 0], [0, 1], [0, 1], [1, 0], [1, 2]])
COUNTS = np.array([5, 1, 0, 2, 1, 1])
CATEGORIES = ["Action, Comedy", "Action", "Drama", "Action|War", "Drama > Sad", "Drama"]


def report(**changes):
    given = {"train_count": COUNTS, "category": CATEGORIES, "brand": [""] * 6} | changes
    return health_report(build_index(CODES, [4, 3]), **given)


def test_usage_by_hand():
    first, second = report()["levels"]
    assert (first["size"], first["used"], first["utilisation"]) == (4, 2, 0.5)
    assert (first["smallest"], first["largest"]) == (0, 4)
    # Shares 2/3 and 1/3: exp(entropy) = 3 / 2^(2/3).
    assert first["perplexity"] == pytest.approx(3 / 2 ** (2 / 3))
    # Bought shares 8/10 and 2/10.
    assert first["target_perplexity"] == pytest.approx(1 / (0.8**0.8 * 0.2**0.2))
    assert (second["used"], second["utilisation"]) == (3, 1.0)


def test_collisions_are_weighted_by_what_is_bought():
    collisions = report()["collisions"]
    assert (collisions["distinct"], collisions["groups"], collisions["items"]) == (4, 2, 4)
    assert collisions["item_share"] == pytest.approx(4 / 6)
    assert collisions["target_share"] == pytest.approx(8 / 10)
    assert collisions["largest_group"] == 2
    assert collisions["group_sizes"] == {1: 2, 2: 2}
    assert report(train_count=np.zeros(6, int))["collisions"]["target_share"] is None


def test_what_two_codebooks_share_by_hand():
    (pair,) = report()["dependence"]
    assert pair["levels"] == [0, 1]
    first, second, both = (
        -sum(p * np.log(p) for p in shares)
        for shares in ([4 / 6, 2 / 6], [3 / 6, 2 / 6, 1 / 6], [2 / 6, 2 / 6, 1 / 6, 1 / 6])
    )
    assert pair["information"] == pytest.approx(first + second - both)
    assert "two codebooks share 0.318 nats" in format_report(report())


def test_branching_by_hand():
    first, second = report()["branching"]
    assert first == {"level": 0, "prefixes": 2, "parents": 2, "mean_children": 2.0, "max_children": 2}
    # Only the colliding prefixes have children: two disambiguation codes each.
    assert second == {"level": 1, "prefixes": 4, "parents": 2, "mean_children": 2.0, "max_children": 2}


def test_agreement_with_the_first_category():
    agreement = report()["agreement"]
    assert (agreement["with"], agreement["labels"], agreement["items"]) == ("category", 2, 6)
    one, two = agreement["prefixes"]
    assert one["purity"] == pytest.approx(5 / 6)  # prefix 0: 3 of 4 Action; prefix 1: 2 of 2 Drama
    assert two["purity"] == pytest.approx(5 / 6)
    assert 0 < one["nmi"] < 1


def test_without_categories_the_brand_counts_and_without_both_nothing():
    agreement = report(category=[""] * 6, brand=["x", "x", "", "x", "y", "y"])["agreement"]
    assert (agreement["with"], agreement["items"]) == ("brand", 5)
    assert agreement["prefixes"][0]["purity"] == 1.0
    assert agreement["prefixes"][0]["nmi"] == pytest.approx(1.0)
    assert report(category=[""] * 6)["agreement"] == {"with": None, "prefixes": []}


@pytest.mark.parametrize(
    ("text", "first"),
    [("Action, Comedy", "Action"), ("A > B", "A"), ("A|B", "A"), ("Men's Wear", "Men's Wear"), (" ", "")],
)
def test_first_category(text, first):
    assert first_category(text) == first


def test_behaviour_by_hand():
    # Of four pairs the one of an item with itself is left out; two of the other three share the first code.
    behaviour = report(neighbours=(np.array([0, 0, 1, 4]), np.array([0, 2, 4, 5])))["behaviour"]
    assert behaviour["pairs"] == 3
    assert behaviour["prefixes"][0]["shared"] == pytest.approx(2 / 3)
    nobody = (np.zeros(0, int), np.zeros(0, int))
    assert report(neighbours=nobody)["behaviour"] == {"pairs": 0, "prefixes": []}


def test_information_of_codes_that_decide_the_next_one():
    first, second = np.array([0, 1, 4, 5] * 50), np.array([4, 5, 0, 1] * 50)
    behaviour = report(neighbours=(first, second))["behaviour"]
    assert behaviour["prefixes"][0]["shared"] == 0
    assert behaviour["prefixes"][0]["information"] == pytest.approx(np.log(2))
    assert behaviour["prefixes"][0]["information_by_chance"] < 0.1


def test_unexplained_variance_by_hand():
    embeddings = np.array([[0.0], [0.0], [2.0], [2.0], [10.0], [12.0]], dtype=np.float32)
    books = [
        np.array([[1.0], [11.0], [0.0], [0.0]], np.float32),
        np.array([[-1.0], [1.0], [1.0]], np.float32),
    ]
    levels = report(
        embeddings=embeddings,
        reconstruct=lambda codes: np.sum([books[level][column] for level, column in enumerate(codes.T)], axis=0),
    )["levels"]
    variance = np.square(embeddings - embeddings.mean()).sum()
    assert levels[0]["unexplained"] == pytest.approx(6 / variance)
    assert levels[1]["unexplained"] == pytest.approx(0)


def test_the_report_is_json_and_prints():
    full = report(neighbours=(np.array([0, 1]), np.array([2, 4])))
    assert json.loads(json.dumps(full))["n_items"] == 6
    text = format_report(full)
    assert "4 of 6 items (66.7%) in 2 groups, the largest of 2; 80.0% of training targets" in text
    assert "against the category" in text
    assert "change: 80% of the training targets need a code that only tells equals apart; use larger" in text
