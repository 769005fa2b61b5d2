import pytest

from reasonrec.tokenizers.health_verdicts import verdicts


def report(perplexity=60.0, target_share=0.1, lift=5.0, **changes):
    levels = [{"level": 0, "size": 64, "perplexity": 64.0}, {"level": 1, "size": 64, "perplexity": perplexity}]
    return {
        "levels": levels,
        "collisions": {"target_share": target_share, "item_share": 0.9},
        "behaviour": {"prefixes": [{"lift": lift}]},
        "agreement": {"with": "category", "prefixes": [{"purity": 0.6, "purity_by_chance": 0.3}]},
    } | changes


def grades(**changes):
    return {verdict["about"]: verdict["grade"] for verdict in verdicts(report(**changes))}


def test_a_sound_index_is_good():
    assert grades() == {"usage": "good", "collisions": "good", "meaning": "good"}


@pytest.mark.parametrize(
    ("changes", "about", "grade", "said"),
    [
        ({"perplexity": 32.0}, "usage", "acceptable", "over level 1 as over 32 of its 64 codes"),
        ({"perplexity": 9.0}, "usage", "change", "as over 9 of its 64 codes; use quantizer: balanced"),
        ({"target_share": 0.5}, "collisions", "acceptable", "50% of the training targets"),
        ({"target_share": 0.8}, "collisions", "change", "use larger codebook_sizes"),
        ({"target_share": None}, "collisions", "change", "90% of the items"),  # nothing was bought
        ({"lift": 2.0}, "meaning", "acceptable", "2.0 times as often as by chance"),
        ({"lift": 1.0}, "meaning", "change", "try collaboration: auto"),
        ({"behaviour": {"prefixes": []}}, "meaning", "good", "60% of the items have the main category"),
    ],
)
def test_each_number_has_its_verdict(changes, about, grade, said):
    (found,) = (verdict for verdict in verdicts(report(**changes)) if verdict["about"] == about)
    assert found["grade"] == grade
    assert said in found["sentence"]


def test_what_is_not_known_is_not_judged():
    assert "meaning" not in grades(behaviour={"prefixes": []}, agreement={"with": None, "prefixes": []})
