"""The item search against brute force on the model's own logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from reasonrec.recipes.models.load import LoraSettings, add_adapter, load_base
from reasonrec.tokenizers.constrain import legal_log_probs
from reasonrec.tokenizers.decode import beam_search, score_all_items
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.trie import Trie
from reasonrec.tokenizers.vocabulary import Vocabulary

TEXT = 20  # ordinary tokens in front of the begin marker
COLUMNS = 40
SIZES = (5, 6, 3)


def small_model(*, tied: bool = True, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=TEXT + 1 + COLUMNS,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,  # far from uniform, so that an order means something
        tie_word_embeddings=tied,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config).eval()


def random_codes(rng: np.random.Generator, n_items: int, sizes: tuple[int, ...]) -> np.ndarray:
    """Unique codes on all levels but the last, where about half of the groups are told apart by the last level."""
    every = np.stack(np.meshgrid(*map(np.arange, sizes[:-1]), indexing="ij"), -1).reshape(-1, len(sizes) - 1)
    rows = []
    for row in every[rng.permutation(len(every))]:
        size = sizes[-1] if len(sizes) > 1 and rng.random() < 0.5 else 0
        rows += [[*row, last] for last in range(size)] if size else [[*row, -1]]
    codes = np.array(rows[:n_items])
    return codes[rng.permutation(len(codes))]


class World:
    """A model, a trie and prompts."""

    def __init__(self, model, rng: np.random.Generator, *, n_items: int = 40, sizes: tuple[int, ...] = SIZES) -> None:
        self.model = model
        self.codes = random_codes(rng, n_items, sizes)
        self.n_items = len(self.codes)
        self.trie = Trie.from_codes(self.codes, sizes)
        self.vocabulary = Vocabulary(sizes, TEXT)
        self.ids = self.vocabulary.item_token_ids(self.codes)
        self.prompts = [[*rng.integers(0, TEXT, size=n).tolist(), TEXT] for n in (3, 9, 1, 6)]

    def batch(self, prompts: list[list[int]], pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(map(len, prompts)) + pad
        ids = torch.tensor([[7] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        return ids, mask

    def beam(self, prompts=None, pad: int = 0, **options):
        options = {"k": self.n_items, "num_beams": self.n_items} | options
        return beam_search(
            self.model, self.trie, self.vocabulary, *self.batch(prompts or self.prompts, pad), **options
        )

    @torch.no_grad()
    def brute_force(self, prompt: list[int], forward=None) -> np.ndarray:
        """Log-probability of each item from full logits, with a dictionary instead of a trie."""
        legal: dict[tuple[int, ...], set[int]] = {}
        for ids in self.ids:
            for n in range(len(ids)):
                legal.setdefault(tuple(ids[:n]), set()).add(ids[n])
        scores = []
        for ids in self.ids:
            logits = (forward or self.model)(torch.tensor([prompt + ids])).logits[0].double()
            score = 0.0
            for n, token in enumerate(ids):
                children = sorted(legal[tuple(ids[:n])])
                row = logits[len(prompt) - 1 + n, children].log_softmax(0)
                score += float(row[children.index(token)])
            scores.append(score)
        return np.array(scores)


@pytest.fixture(scope="module")
def world():
    return World(small_model(), np.random.default_rng(0))


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


def test_untied_heads_are_read_from_the_head():
    world = World(small_model(tied=False, seed=4), np.random.default_rng(4), n_items=25)
    found = world.beam()
    for user, prompt in enumerate(world.prompts):
        brute = world.brute_force(prompt)
        assert found.items[user].tolist() == np.argsort(-brute).tolist()


def architecture(name: str, **options):
    """A two-layer model of another family."""
    common = {
        "vocab_size": TEXT + 1 + COLUMNS,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **(common | options))).eval()
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:
        torch.nn.init.normal_(bias)
    return model


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
def test_other_architectures(name, options):
    world = World(architecture(name, **options), np.random.default_rng(0), n_items=25)
    found = world.beam()
    for user, prompt in enumerate(world.prompts):
        brute = world.brute_force(prompt)
        np.testing.assert_allclose(found.scores[user], np.sort(brute)[::-1], atol=1e-4)
        assert found.items[user].tolist() == np.argsort(-brute).tolist()


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("mistral", {"sliding_window": 12}, "12 in some layers: lower max_history"),
        ("mamba", {"state_size": 4}, "recurrent state"),
    ],
)
def test_models_that_the_search_cannot_read_are_refused(name, options, why):
    world = World(architecture(name, **options), np.random.default_rng(0), n_items=25)
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
    found = [
        beam_search(world.model, world.trie, world.vocabulary, x, mask, k=9, num_beams=9) for x in (ids, other)
    ]
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


def test_random_tries_and_masks_never_give_an_invalid_item():
    rng = np.random.default_rng(7)
    model = small_model(seed=1)
    for _ in range(250):
        sizes = tuple(rng.integers(1, 6, size=int(rng.integers(1, 5))).tolist())
        if len(sizes) == 1:
            sizes = (*sizes, int(rng.integers(1, 4)))
        world = World(model, rng, n_items=int(rng.integers(1, 40)), sizes=sizes)
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


def test_legal_log_probs_are_minus_infinity_where_there_is_no_child():
    logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    child, column = torch.tensor([[4, 5, -1], [-1, -1, -1]]), torch.tensor([[0, 2, 0], [0, 0, 0]])
    result = legal_log_probs(logits, child, column)
    np.testing.assert_allclose(result[0, :2].exp(), [1 / (1 + np.e**2), np.e**2 / (1 + np.e**2)], rtol=1e-6)
    assert result[0, 2] == -torch.inf
    assert (result[1] == -torch.inf).all()


def perturb(model: torch.nn.Module, scale: float = 0.3) -> None:
    """Move everything trainable, so that a forgotten adapter shows."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("tied", [True, False])
def test_an_unmerged_adapter_is_searched_with_its_rows(tied):
    world = World(small_model(tied=tied, seed=2), np.random.default_rng(2), n_items=25)
    before = world.beam()
    adapted = add_adapter(world.model, world.vocabulary, LoraSettings(4, 8, 0.0, "all-linear")).eval()
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


def test_a_4_bit_base_with_an_adapter_is_searched(tmp_path):
    small_model(seed=6).save_pretrained(tmp_path)
    base = load_base(str(tmp_path), method="qlora").eval()
    assert base.is_loaded_in_4bit
    world = World(base, np.random.default_rng(6), n_items=25)
    adapted = add_adapter(base, world.vocabulary, LoraSettings(4, 8, 0.0, "all-linear")).eval()
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
