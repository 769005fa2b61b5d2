"""The item search against brute force on the model's own logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reasonrec.recipes.decoding.score import score_all_items
from reasonrec.recipes.decoding.search import beam_search
from reasonrec.recipes.models.load import LoraSettings, add_adapter, load_base
from reasonrec.recipes.models.precision import choose
from reasonrec.tokenizers.errors import UserError

TEXT = 20  # ordinary tokens in front of the begin marker, as in conftest


def test_a_beam_as_wide_as_the_catalogue_is_the_exact_ranking(world):
    found = world.beam()
    exact = score_all_items(
        world.model, world.trie, world.vocabulary, *world.batch(world.prompts), item_token_ids=world.ids, batch_size=7
    )
    for user, prompt in enumerate(world.prompts):
        brute = world.brute_force(prompt)
        np.testing.assert_allclose(exact[user], brute, atol=1e-4)
        assert found.items[user].tolist() == np.argsort(-brute, kind="stable").tolist()
        np.testing.assert_allclose(found.scores[user], np.sort(brute)[::-1], atol=1e-4)


def test_the_probabilities_of_all_items_sum_to_one(world):
    np.testing.assert_allclose(world.beam().scores.double().exp().sum(1), 1, atol=1e-5)
    for prompt in world.prompts:
        assert np.exp(world.brute_force(prompt)).sum() == pytest.approx(1, abs=1e-6)


def test_untied_heads_are_read_from_the_head(make_world, make_model):
    world = make_world(make_model(tied=False, seed=4), np.random.default_rng(4), n_items=25)
    found = world.beam()
    for user, prompt in enumerate(world.prompts):
        brute = world.brute_force(prompt)
        assert found.items[user].tolist() == np.argsort(-brute).tolist()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qwen3", {"head_dim": 16}),
        ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}),  # learned positions
        ("phi", {}),  # a bias on the head
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 8.0}),
        ("gemma2", {"head_dim": 16, "sliding_window": 32, "final_logit_softcapping": 3.0}),
        ("mistral", {"sliding_window": 32}),
    ],
)
def test_other_architectures(name, options, make_world, make_architecture):
    world = make_world(make_architecture(name, **options), np.random.default_rng(0), n_items=25)
    found = world.beam()
    for user, prompt in enumerate(world.prompts):
        brute = world.brute_force(prompt)
        np.testing.assert_allclose(found.scores[user], np.sort(brute)[::-1], atol=1e-4)
        assert found.items[user].tolist() == np.argsort(-brute).tolist()


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("mistral", {"sliding_window": 12}, "in some layers sees only 12: lower max_history"),
        ("mamba", {"state_size": 4}, "recurrent state"),
    ],
)
def test_models_that_the_search_cannot_read_are_refused(name, options, why, make_world, make_architecture):
    world = make_world(make_architecture(name, **options), np.random.default_rng(0), n_items=25)
    with pytest.raises(UserError, match=why):
        world.beam()


@pytest.mark.parametrize(("k", "num_beams"), [(5, 8), (40, 40)])
def test_padding_batch_order_and_batch_size_change_nothing(world, k, num_beams):
    options = {"k": k, "num_beams": num_beams, "exclude": [[1, 2], [], [3], [*range(20)]]}
    together = world.beam(**options)
    for pad in (1, 13):
        padded = world.beam(pad=pad, **options)
        assert torch.equal(padded.items, together.items)
        torch.testing.assert_close(padded.scores, together.scores, atol=1e-5, rtol=1e-5)
    order = [2, 0, 3, 1]
    shuffled = world.beam(
        [world.prompts[i] for i in order], **{**options, "exclude": [options["exclude"][i] for i in order]}
    )
    assert torch.equal(shuffled.items, together.items[order])
    torch.testing.assert_close(shuffled.scores, together.scores[order], atol=1e-5, rtol=1e-5)
    for user, prompt in enumerate(world.prompts):
        alone = world.beam([prompt], **{**options, "exclude": [options["exclude"][user]]})
        assert torch.equal(alone.items[0], together.items[user])
        torch.testing.assert_close(alone.scores[0], together.scores[user], atol=1e-5, rtol=1e-5)


def test_what_stands_under_the_padding_is_not_read(world):
    ids, mask = world.batch(world.prompts, pad=3)
    other = torch.where(mask.bool(), ids, 11)
    found = [beam_search(world.model, world.trie, world.vocabulary, x, mask, k=9, num_beams=9) for x in (ids, other)]
    assert torch.equal(found[0].items, found[1].items)
    assert torch.equal(found[0].scores, found[1].scores)


def test_excluded_items_vanish_and_the_others_keep_order_and_probability(world):
    rng = np.random.default_rng(1)
    everything = world.beam()
    exclude = [rng.permutation(world.n_items)[:n] for n in (1, 10, 38, 0)]
    found = world.beam(exclude=exclude)
    for user, gone in enumerate(exclude):
        left = [i for i in everything.items[user].tolist() if i not in set(gone.tolist())]
        assert found.items[user].tolist() == left + [-1] * len(gone)
        kept = [everything.scores[user][everything.items[user] == i].item() for i in left]
        np.testing.assert_allclose(found.scores[user][: len(left)], kept, atol=1e-5)
        assert torch.isinf(found.scores[user][len(left) :]).all()


def test_a_narrow_beam_is_not_filled_with_excluded_subtrees(world):
    """All of what the beam would have kept is excluded: masking inside the trie still fills the list."""
    best = world.beam().items[:, :30]
    found = world.beam(k=5, num_beams=5, exclude=best.tolist())
    assert (found.items >= 0).all()
    for user in range(len(world.prompts)):
        assert not set(found.items[user].tolist()) & set(best[user].tolist())


def test_everything_excluded_gives_an_empty_list(world):
    found = world.beam(k=3, num_beams=4, exclude=[range(world.n_items)] * 4)
    assert (found.items == -1).all()
    assert (found.scores == -torch.inf).all()
    one = world.beam(k=3, num_beams=4, exclude=[range(world.n_items), [], range(1, world.n_items), []])
    assert (one.items[0] == -1).all()
    assert one.items[2].tolist() == [0, -1, -1]
    assert (one.items[[1, 3]] >= 0).all()


def test_more_items_wanted_than_there_are(world):
    found = world.beam(k=world.n_items + 3, num_beams=world.n_items + 5)
    assert (found.items[:, -3:] == -1).all()
    assert found.items[0, :-3].sort().values.tolist() == list(range(world.n_items))


def test_k_above_num_beams_is_refused(world):
    with pytest.raises(UserError, match=r"num_beams=4 .* k=5"):
        world.beam(k=5, num_beams=4)


@pytest.mark.parametrize("bad_step", [0, 1, 2])
def test_nan_is_an_error_that_names_the_step(world, bad_step):
    calls = 0

    def poison(module, args, kwargs, output):
        nonlocal calls
        if calls == bad_step:
            output.last_hidden_state[0, 0] = torch.nan
        calls += 1

    handle = world.model.base_model.register_forward_hook(poison, with_kwargs=True)
    try:
        with pytest.raises(FloatingPointError, match=f"NaN logits at step {bad_step}"):
            world.beam([world.prompts[2][:1]])
    finally:
        handle.remove()


def test_random_tries_and_masks_never_give_an_invalid_item(make_world, make_model):
    rng = np.random.default_rng(7)
    model = make_model(seed=1)
    for _ in range(300):
        sizes = tuple(rng.integers(1, 6, size=int(rng.integers(1, 5))).tolist())
        if len(sizes) == 1:
            sizes = (*sizes, int(rng.integers(1, 4)))
        world = make_world(model, rng, n_items=int(rng.integers(1, 40)), sizes=sizes)
        prompts = world.prompts[: int(rng.integers(1, 5))]
        exclude = [rng.integers(0, world.n_items, size=int(rng.integers(0, world.n_items + 3))) for _ in prompts]
        k = int(rng.integers(1, 8))
        num_beams = k + int(rng.integers(0, 8))
        found = world.beam(prompts, pad=int(rng.integers(0, 3)), k=k, num_beams=num_beams, exclude=exclude)
        assert found.items.shape == found.scores.shape == (len(prompts), k)
        for user, gone in enumerate(exclude):
            items = found.items[user].tolist()
            allowed = set(range(world.n_items)) - set(gone.tolist())
            real = [i for i in items if i >= 0]
            assert items == real + [-1] * (k - len(real)), "gaps only at the end"
            assert len(set(real)) == len(real), "no duplicates"
            assert set(real) <= allowed, "nothing excluded, nothing invented"
            assert len(real) == min(k, len(allowed)), "no list is shorter than it has to be"
            scores = found.scores[user]
            assert (scores[:-1] >= scores[1:]).all()
            assert torch.isfinite(scores[: len(real)]).all()
            assert (scores[: len(real)] <= 1e-6).all()


def perturb(model: torch.nn.Module, scale: float = 0.3) -> None:
    """Move everything trainable, so that a forgotten adapter shows."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("tied", [True, False])
def test_an_unmerged_adapter_is_searched_with_its_rows(tied, make_world, make_model):
    world = make_world(make_model(tied=tied, seed=2), np.random.default_rng(2), n_items=25)
    before = world.beam()
    adapted = add_adapter(world.model, world.vocabulary.token_ids, LoraSettings(4, 8, 0.0, "all-linear")).eval()
    torch.testing.assert_close(world.beam().scores, before.scores, atol=1e-5, rtol=1e-5)
    perturb(adapted)
    found = world.beam()
    assert not torch.equal(found.items, before.items)
    for user, prompt in enumerate(world.prompts):
        brute = world.brute_force(prompt, forward=adapted)
        assert found.items[user].tolist() == np.argsort(-brute).tolist()
        np.testing.assert_allclose(found.scores[user], np.sort(brute)[::-1], atol=1e-3)
    with adapted.disable_adapter():
        torch.testing.assert_close(world.beam().scores, before.scores, atol=1e-5, rtol=1e-5)
    adapted.merge_adapter()
    merged = world.beam()
    assert torch.equal(merged.items, found.items)
    torch.testing.assert_close(merged.scores, found.scores, atol=1e-3, rtol=1e-3)
    adapted.unmerge_adapter()
    torch.testing.assert_close(world.beam().scores, found.scores, atol=1e-3, rtol=1e-3)


def test_a_4_bit_base_with_an_adapter_is_searched(tmp_path, make_world, make_model, expanded_at_every_step):
    make_model(seed=6).save_pretrained(tmp_path)
    base = load_base(str(tmp_path), method="qlora", precision=choose("bf16", "cpu")).eval()
    assert base.is_loaded_in_4bit
    world = make_world(base, np.random.default_rng(6), n_items=25)
    adapted = add_adapter(base, world.vocabulary.token_ids, LoraSettings(4, 8, 0.0, "all-linear")).eval()
    perturb(adapted, 0.1)
    found = world.beam()
    np.testing.assert_allclose(found.scores.double().exp().sum(1), 1, atol=1e-3)
    for user, prompt in enumerate(world.prompts):
        assert sorted(found.items[user].tolist()) == list(range(world.n_items))
        brute = world.brute_force(prompt, forward=adapted)
        # bf16 arithmetic, in another order: no exact ties, but the same distribution.
        by_item = np.empty(world.n_items)
        by_item[found.items[user].numpy()] = found.scores[user].numpy()
        assert np.abs(np.exp(by_item) - np.exp(brute)).max() < 0.03
        assert np.corrcoef(by_item, brute)[0, 1] > 0.995


def test_a_shorter_list_is_the_beginning_of_a_longer_one(world):
    """Beams that cannot reach the list are dropped early; the list does not notice."""
    for num_beams in (6, 15, 40):
        whole = world.beam(k=num_beams, num_beams=num_beams)
        for k in (1, 3, 6):
            short = world.beam(k=k, num_beams=num_beams)
            torch.testing.assert_close(short.scores, whole.scores[:, :k], atol=1e-5, rtol=1e-5)
            assert torch.equal(short.items, whole.items[:, :k])


@pytest.mark.parametrize("full_vocabulary", [False, True])
def test_an_exact_search_finds_the_exhaustive_list_with_few_beams(full_vocabulary, make_world, make_model):
    """Random catalogues and exclusions; a narrow beam misses items in some of them, and says so."""
    rng = np.random.default_rng(11)
    model = make_model(seed=1)
    missed = 0
    for _ in range(60):
        sizes = tuple(rng.integers(3, 7, size=3).tolist())
        world = make_world(model, rng, n_items=int(rng.integers(10, 60)), sizes=sizes)
        exclude = [rng.integers(0, world.n_items, size=int(rng.integers(0, 8))) for _ in world.prompts]
        options = {"exclude": exclude, "full_vocabulary": full_vocabulary}
        every = world.beam(**options)
        k = int(rng.integers(1, 6))
        narrow = world.beam(k=k, num_beams=k, **options)
        exact = world.beam(k=k, num_beams=k, exact=True, **options)
        assert exact.proven.all()
        torch.testing.assert_close(exact.scores, every.scores[:, :k], atol=1e-5, rtol=1e-5)
        assert torch.equal(exact.items, every.items[:, :k])
        same = (narrow.items == exact.items).all(1)
        assert (same | ~narrow.proven).all(), "a proven list is the exact one"
        missed += int((~same).sum())
    assert missed > 10


def test_an_exact_search_that_loses_patience_says_so(world, monkeypatch):
    from reasonrec.recipes.decoding import search as decode

    monkeypatch.setattr(decode, "PATIENCE", 1)
    found = world.beam(k=2, num_beams=2, exact=True)
    narrow = world.beam(k=2, num_beams=2)
    assert torch.equal(found.items, narrow.items)
    assert torch.equal(found.proven, narrow.proven)
    assert not found.proven.all()
    assert world.beam(k=5, num_beams=world.n_items).proven.all()


def test_an_exact_search_reads_hardly_more_than_a_beam_where_that_is_enough(world):
    counts = []
    handle = world.model.base_model.register_forward_hook(
        lambda _, __, out: counts.append(out.last_hidden_state.shape[1])
    )
    more = {True: [], False: []}
    for prompt in [*world.prompts, *([n, 20] for n in range(20))]:
        tokens = []
        for exact in (False, True):
            counts.clear()
            found = world.beam([prompt], k=1, num_beams=2, exact=exact)
            tokens.append(sum(counts))
            if not exact:
                proven = bool(found.proven)
        more[proven].append(tokens[1] - tokens[0])
    handle.remove()
    assert more[True]
    assert np.median(more[True]) == 0
    assert max(more[True]) <= 2, "what only the items found in the same step made superfluous"
    assert more[False]
    assert min(more[False]) > 0


def test_a_step_that_no_beam_needs_is_skipped(make_world, make_model):
    """Two levels, one item per first code: the second code is certain."""
    world = make_world(make_model(), np.random.default_rng(0), n_items=3, sizes=(6, 6))
    world.codes = np.array([[0, 3], [2, 1], [5, 5]])
    world.trie = type(world.trie).from_codes(world.codes, (6, 6))
    calls = []
    handle = world.model.base_model.register_forward_hook(lambda *_: calls.append(1))
    try:
        found = world.beam(k=3, num_beams=3)
    finally:
        handle.remove()
    assert len(calls) == 1
    assert sorted(found.items[0].tolist()) == [0, 1, 2]
    np.testing.assert_allclose(found.scores.exp().sum(1), 1, atol=1e-5)


def test_the_cache_is_written_once_and_never_moves(world, monkeypatch):
    from reasonrec.recipes.decoding import prefix
    from reasonrec.recipes.decoding import search as decode

    places = []

    def spy(model, cache, *rest, **options):
        hidden = prefix_forward(model, cache, *rest, **options)
        places.append([(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers])
        return hidden

    prefix_forward = prefix.forward
    monkeypatch.setattr(prefix, "forward", spy)
    monkeypatch.setattr(decode, "forward", spy)
    world.beam()
    assert len(places) == 3
    assert places[0] == places[1] == places[2]


@pytest.mark.parametrize(("dtype", "attention"), [("bfloat16", "sdpa"), ("float32", "eager"), ("bfloat16", "eager")])
def test_dtypes_and_attention_kernels(dtype, attention, make_world, make_model):
    model = make_model().to(getattr(torch, dtype))
    model.set_attn_implementation(attention)
    world = make_world(model, np.random.default_rng(0), n_items=25)
    found = world.beam()
    np.testing.assert_allclose(found.scores.double().exp().sum(1), 1, atol=1e-3)
    plain = make_world(make_model(), np.random.default_rng(0), n_items=25)
    for user, prompt in enumerate(plain.prompts):
        by_item = np.empty(25)
        by_item[found.items[user].numpy()] = found.scores[user].numpy()
        error = np.abs(np.exp(by_item) - np.exp(plain.brute_force(prompt))).max()
        assert error < (1e-5 if dtype == "float32" else 0.05)


def test_a_prompt_longer_than_the_context_is_refused(world):
    prompt = [1] * 126 + [TEXT]
    with pytest.raises(UserError, match=r"130 tokens, but llama sees at most 128: lower max_history"):
        world.beam([prompt])


def test_an_empty_prompt_is_refused(world):
    ids = torch.tensor([[TEXT], [TEXT]])
    with pytest.raises(UserError, match="a prompt is empty"):
        beam_search(world.model, world.trie, world.vocabulary, ids, torch.tensor([[1], [0]]), k=1, num_beams=1)


def test_a_trie_of_another_vocabulary_is_refused(world):
    other = type(world.vocabulary)((5, 6, 4), TEXT)
    with pytest.raises(UserError, match="different item indexes"):
        beam_search(world.model, world.trie, other, *world.batch(world.prompts), k=1, num_beams=1)


def test_longer_lists_than_the_catalogue_end_in_nothing(world):
    found = world.beam(k=50, num_beams=50, exclude=[range(5, world.n_items)] * 4)
    for row in found.items.tolist():
        assert sorted(row[:5]) == [0, 1, 2, 3, 4]
        assert row[5:] == [-1] * 45


@pytest.mark.parametrize("k", [0, -1])
def test_a_list_has_to_have_a_length(world, k):
    with pytest.raises(UserError, match=f"k={k} has to be a whole number, from 1 to 1,000,000"):
        world.beam(k=k)
