"""What is trained is what ranks: at every position of a history, in the loss, behind chains, with gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reasonrec.recipes.decoding.generate_chains import GenerateWriter
from reasonrec.recipes.decoding.sample import Sampler, noise, roll_out
from reasonrec.recipes.policies.base import install
from reasonrec.recipes.policies.dual_head.answers import ITEM_BASE
from reasonrec.recipes.policies.inference import Ranking, rank, score

COUNTS = [3, 9, 1, 4, 4, 2, 7]  # as in `make_head`
HISTORIES = [[0, 3, 5, 1], [2], [6, 4, 4]]
TARGETS = [2, 6, 0]
CLOSE = 1e-5
centred = pytest.mark.parametrize("centre", [False, True])
prior = pytest.mark.parametrize("popularity_prior", [False, True])


def fused(made, examples):
    """What the trainer gets for a batch, right-padded as TRL's collator pads."""
    width = max(len(ids) for ids, _ in examples)
    pad = made.policy.pad_id
    ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in examples])
    labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in examples])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in examples])
    return made.model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)


def vectors(made, prompts):
    """The last hidden state of each prompt read by itself, without the catalogue's mean if so set, of length 1."""
    rows = [made.base.base_model(input_ids=torch.tensor([p])).last_hidden_state[0, -1] for p in prompts]
    mean = made.policy.answers.mean
    return torch.nn.functional.normalize(torch.stack(rows) - (0 if mean is None else mean), dim=-1)


@pytest.mark.parametrize("history_prompt", ["History:{history}", "Seen:{history}\nNext:"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_every_position_of_a_history_is_read_as_at_inference(make_head, method, history_prompt):
    made = make_head(method, history_prompt=history_prompt)
    install(made.base, made.policy.answers)
    with torch.no_grad():
        out = fused(made, [made.policy.prompts.sequence(h, t) for h, t in zip(HISTORIES, TARGETS, strict=True)])
    prompts, wanted = [], []
    for history, target in zip(HISTORIES, TARGETS, strict=True):
        for stop in range(1, len(history) + 1):
            prompts.append(made.policy.prompts.direct(history[:stop]))
            wanted.append([*history, target][stop])
    expected = score(made.policy, made.base, prompts, np.array(wanted)[:, None])[:, 0]
    found = out.log_probs[out.label_mask]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)
    assert np.ptp(expected) > 0.01, "positions differ"
    assert float(out.loss) == pytest.approx(-expected.mean(), abs=1e-4)


@prior
@centred
def test_the_loss_over_the_catalogue_by_hand(make_head, centre, popularity_prior):
    made = make_head(temperature=0.1, centre=centre, popularity_prior=popularity_prior)
    install(made.base, made.policy.answers)
    examples = [
        (made.policy.prompts.direct(h) + made.policy.prompts.answer(t),
         [-100] * len(made.policy.prompts.direct(h)) + made.policy.prompts.answer(t))
        for h, t in zip(HISTORIES, TARGETS, strict=True)
    ]  # fmt: skip
    out = fused(made, examples)
    queries = vectors(made, [made.policy.prompts.direct(h) for h in HISTORIES])
    items = vectors(made, made.policy.answers.item_prompts)
    logits = queries.double() @ items.double().T / 0.1 + popularity_prior * torch.tensor(COUNTS).double().log1p()
    expected = logits.log_softmax(1)[torch.arange(3), TARGETS]
    assert float(out.loss) == pytest.approx(-float(expected.mean().detach()), abs=1e-4)


@prior
@centred
def test_the_loss_in_the_batch_by_hand(make_head, centre, popularity_prior):
    made = make_head(temperature=0.1, over="batch", centre=centre, popularity_prior=popularity_prior)
    install(made.base, made.policy.answers)
    histories, targets = [*HISTORIES, [1, 2]], [2, 6, 0, 6]  # an item that is the target twice is one candidate
    prompts = [made.policy.prompts.direct(h) for h in histories]
    examples = [
        ([*p, ITEM_BASE + t], [-100] * len(p) + [ITEM_BASE + t]) for p, t in zip(prompts, targets, strict=True)
    ]
    out = fused(made, examples)
    items = vectors(made, [made.policy.answers.item_prompts[i] for i in (0, 2, 6)])
    often = torch.tensor([1.0 + COUNTS[i] for i in (0, 2, 6)]).log()  # popular items are rivals more often
    logits = vectors(made, prompts) @ items.T / 0.1 + popularity_prior * often - often
    expected = logits.log_softmax(1)[torch.arange(4), [1, 2, 0, 2]]
    assert float(out.loss) == pytest.approx(-float(expected.mean()), abs=1e-4)


@centred
def test_the_gradient_goes_into_the_history_and_into_reading_the_targets(make_head, centre):
    """The whole gradient is that of the loss with all target vectors read; the others, and the mean, are fixed."""
    made = make_head(temperature=0.1, centre=centre)
    install(made.base, made.policy.answers)
    prompts = [made.policy.prompts.direct(h) for h in HISTORIES]
    examples = [
        ([*p, ITEM_BASE + t], [-100] * len(p) + [ITEM_BASE + t]) for p, t in zip(prompts, TARGETS, strict=True)
    ]
    table = made.policy.answers.table.clone()
    fused(made, examples).loss.backward()
    weight = made.base.base_model.layers[0].self_attn.q_proj.weight
    found = weight.grad.clone()

    def by_hand(*, fresh: bool) -> torch.Tensor:
        weight.grad = None
        items = table.clone()
        if fresh:
            items = items.index_copy(
                0, torch.tensor(TARGETS), vectors(made, [made.policy.answers.item_prompts[t] for t in TARGETS])
            )
        logits = vectors(made, prompts) @ items.T / 0.1
        (-logits.log_softmax(1)[torch.arange(3), TARGETS].mean()).backward()
        return weight.grad.clone()

    torch.testing.assert_close(found, by_hand(fresh=True), atol=1e-5, rtol=1e-3)
    assert (found - by_hand(fresh=False)).abs().max() > 1e-3, "reading the targets has a gradient of its own"
    assert not made.policy.answers.table.requires_grad


def test_the_mean_is_that_of_all_items_and_apart_from_it_they_point_everywhere(make_head):
    plain, apart = make_head(), make_head(centre=True)
    read = [
        plain.base.base_model(input_ids=torch.tensor([p])).last_hidden_state[0, -1]
        for p in plain.policy.answers.item_prompts
    ]
    torch.testing.assert_close(apart.policy.answers.mean, torch.stack(read).mean(0), atol=CLOSE, rtol=0)
    assert plain.policy.answers.mean is None

    def alike(made):
        return float((made.policy.answers.table @ made.policy.answers.table.T).mean())

    assert alike(plain) > 0.5 > 0.2 > alike(apart)


@pytest.mark.parametrize("over", ["catalogue", "batch"])
def test_the_loss_is_float32_under_autocast(make_head, monkeypatch, over):
    """Hidden states are whatever autocast makes of them; their products are not."""
    made = make_head(temperature=0.01, over=over)
    install(made.base, made.policy.answers)
    seen = []
    log_softmax = torch.Tensor.log_softmax
    monkeypatch.setattr(torch.Tensor, "log_softmax", lambda x, dim: seen.append(x.dtype) or log_softmax(x, dim))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused(made, [made.policy.prompts.sequence(h, t) for h, t in zip(HISTORIES, TARGETS, strict=True)])
    assert seen == [torch.float32]


@pytest.mark.parametrize(
    ("over", "fresh", "moved"), [("catalogue", 2, False), ("batch", 1, False), ("batch", 7, True)]
)
def test_what_moved_since_the_table_was_made_is_no_advantage(make_head, over, fresh, moved):
    """Targets that are read beside rows of an older table would be told apart by that alone."""
    made = make_head(over=over, fresh_items=fresh)
    install(made.base, made.policy.answers)
    made.policy.answers.table = made.policy.answers.table.roll(1, 0)
    table = made.policy.answers.table.clone()
    examples = [made.policy.prompts.sequence(h, t) for h, t in zip(HISTORIES, TARGETS, strict=True)]
    found = fused(made, examples).loss
    with torch.no_grad():
        by_the_table = float(fused(made, examples).loss)
    assert (abs(float(found) - by_the_table) > 1e-3) is moved
    found.backward()
    assert made.base.base_model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0
    assert torch.equal(made.policy.answers.table, table)


def test_at_most_so_many_targets_are_read(make_head, monkeypatch):
    made = make_head(fresh_items=1)
    install(made.base, made.policy.answers)
    read, encode = [], made.policy.answers.encode
    monkeypatch.setattr(
        made.policy.answers, "encode", lambda model, items: read.append(len(items)) or encode(model, items)
    )
    fused(made, [made.policy.prompts.sequence(h, t) for h, t in zip(HISTORIES, TARGETS, strict=True)])
    assert read == [1]
    with torch.no_grad():
        fused(made, [made.policy.prompts.sequence(h, t) for h, t in zip(HISTORIES, TARGETS, strict=True)])
    assert read == [1], "without a gradient the table is enough"


@prior
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_lists_are_those_of_reading_everything(make_head, similarity, popularity_prior):
    made = make_head(similarity=similarity, temperature=0.3, popularity_prior=popularity_prior)
    prompts = [made.policy.prompts.direct(h) for h in HISTORIES]
    found = rank(made.policy, made.base, prompts, Ranking(7, 7), exclude=[[1, 2], [], [0]])
    queries = [made.base.base_model(input_ids=torch.tensor([p])).last_hidden_state[0, -1] for p in prompts]
    items = [
        made.base.base_model(input_ids=torch.tensor([p])).last_hidden_state[0, -1]
        for p in made.policy.answers.item_prompts
    ]
    h, v = torch.stack(queries), torch.stack(items)
    if similarity == "cosine":
        h, v = torch.nn.functional.normalize(h, dim=-1), torch.nn.functional.normalize(v, dim=-1)
    often = popularity_prior * torch.tensor(COUNTS).log1p()
    log_probs = (h @ v.T / 0.3 + often).log_softmax(1).detach()
    for user, excluded in enumerate([[1, 2], [], [0]]):
        allowed = [i for i in log_probs[user].argsort(descending=True).tolist() if i not in excluded]
        assert found.items[user].tolist() == [*allowed, *[-1] * len(excluded)]
        np.testing.assert_allclose(found.scores[user, : len(allowed)], log_probs[user, allowed].numpy(), atol=1e-4)
    assert found.proven.all()
    everything = score(made.policy, made.base, prompts, np.tile(np.arange(7), (3, 1)))
    np.testing.assert_allclose(everything, log_probs.numpy(), atol=1e-4)
    np.testing.assert_allclose(np.exp(everything).sum(1), 1, atol=1e-5)


def test_equal_scores_rank_by_popularity_then_by_number(make_head):
    made = make_head()
    width = made.policy.answers.table.shape[1]
    made.policy.answers.table = torch.ones(7, width) / width**0.5
    found = rank(made.policy, made.base, [made.policy.prompts.direct([0])], Ranking(7, 7))
    assert found.items[0].tolist() == [1, 6, 3, 4, 0, 5, 2]


def test_several_prompts_are_merged_as_probabilities(make_head):
    made = make_head()
    prompts = [made.policy.prompts.direct(h) for h in ([0, 3], [2], [1], [6, 4])]
    found = rank(made.policy, made.base, prompts, Ranking(7, 7), chains=2, exclude=[[5], [0]])
    single = np.exp(score(made.policy, made.base, prompts, np.tile(np.arange(7), (4, 1)))).reshape(2, 2, 7).mean(1)
    for user, excluded in enumerate((5, 0)):
        order = [i for i in np.argsort(-single[user], kind="stable") if i != excluded]
        assert found.items[user].tolist() == [*order, -1]
        np.testing.assert_allclose(np.exp(found.scores[user, :6]), single[user, order], rtol=1e-3)


def rolled(made, chain: int, generations: int = 3, writer=None):
    prompts = made.policy.prompts
    render = prompts.reasoning if chain else prompts.direct
    sampler = Sampler(generations, 0.7, chain, prompts.close_ids if chain else ())
    return roll_out(
        made.base, made.policy.answers, [render(h) for h in HISTORIES], sampler,
        eos_ids=[made.policy.eos_id], pad_id=made.policy.pad_id,
        noise=noise(0, 0, [0, 1, 2], generations, chain + 1), writer=writer,
    )  # fmt: skip


def test_behind_chains_of_another_engine_the_best_item_is_the_same(make_head):
    made = make_head("lora")
    expected, found = rolled(made, 5), rolled(made, 5, writer=GenerateWriter(made.base, made.policy.pad_id))
    assert found.completion_ids == expected.completion_ids
    for ours, theirs in zip(found.log_probs, expected.log_probs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("chain", [0, 5])
def test_rollouts_end_with_the_best_item_and_are_scored_as_they_were_drawn(make_head, chain):
    made = make_head("lora")
    rollouts = rolled(made, chain)
    begin, eos = made.policy.answers.begin_id, made.policy.eos_id
    opened = [
        [*p, *(c[: c.index(begin) + 1] if chain else [])]
        for p, c in zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True)
    ]
    best = rank(made.policy, made.base, opened, Ranking(1, 1)).items[:, 0]
    assert rollouts.items.tolist() == best.tolist()
    assert [c[-2:] for c in rollouts.completion_ids] == [[ITEM_BASE + i, eos] for i in best]
    optimised = made.policy.optimised(rollouts, np.array(TARGETS).repeat(3), np.array(TARGETS))
    assert [c[-2] - ITEM_BASE for c in optimised.completion_ids] == list(np.array(TARGETS).repeat(3))
    install(made.base, made.policy.answers, temperature=0.7, answers_only=True)
    p, c = (max(map(len, ids)) for ids in (optimised.prompt_ids, optimised.completion_ids))
    rows = list(zip(optimised.prompt_ids, optimised.completion_ids, strict=True))
    pad = made.policy.pad_id
    ids = torch.tensor([[pad] * (p - len(a)) + a + b + [pad] * (c - len(b)) for a, b in rows])
    mask = torch.tensor([[0] * (p - len(a)) + [1] * (len(a) + len(b)) + [0] * (c - len(b)) for a, b in rows])
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :p] = -100
    with torch.no_grad():
        out = made.model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    found = out.log_probs[:, -c:]
    items = vectors(made, [made.policy.answers.item_prompts[i] for i in sorted(TARGETS)]).detach()
    for row, (recorded, chosen) in enumerate(zip(rollouts.log_probs, rollouts.mask, strict=True)):
        place = optimised.completion_ids[row].index(ITEM_BASE + TARGETS[row // 3])
        logits = vectors(made, [opened[row]]).detach() @ items.T / 0.02
        expected = logits.log_softmax(1)[0, sorted(TARGETS).index(TARGETS[row // 3])]
        assert float(found[row, place]) == pytest.approx(float(expected), abs=2e-3)
        assert float(found[row, place + 1]) == 0, "the end is certain"
        for at in range(place):
            if chosen[at]:
                assert float(found[row, at]) == pytest.approx(recorded[at], abs=1e-4)


def test_the_mean_is_saved_with_the_table(make_head, tmp_path):
    made, other = make_head(centre=True), make_head(centre=True)
    made.model.save_pretrained(tmp_path)
    made.policy.save(tmp_path)
    other.policy.answers.mean, other.policy.answers.table = None, torch.zeros_like(made.policy.answers.table)
    read = other.policy.answers.tokens_read
    other.policy.load(tmp_path, None, other.base)
    assert torch.equal(other.policy.answers.table, made.policy.answers.table)
    assert torch.equal(other.policy.answers.mean, made.policy.answers.mean)
    assert other.policy.answers.tokens_read == read
    plain = make_head()
    plain.policy.load(tmp_path, None, plain.base)
    assert plain.policy.answers.mean is None, "a table without a mean is another one, and read anew"
    assert plain.policy.answers.tokens_read == 2 * read
