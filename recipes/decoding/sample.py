"""Rollouts: what the policy itself writes behind a prompt, drawn from the distribution that is optimised.

*Direct*: the prompt ends with the begin marker, and the codes of one item follow. *Reasoning*: a free-form chain
comes first; it ends with its closing delimiter, or with the begin marker if the policy writes that. A chain that wants
to end the sequence, or does not end within `max_chain` tokens, is cut there and closed. The begin marker that is put
behind every other chain, and the delimiter behind a cut one, are nobody's choice: they stay out of the loss, as do
codes without an alternative and the end of the sequence behind a complete item.

A prompt is read once. Its generations are *lanes* of one sequence: each step appends one position per lane to the
cache, and a 4-D attention mask shows every lane the prompt and its own positions only, so nothing is ever copied.

The noise of a generation is a function of (seed, step, prompt, generation) alone: it stays the same in other batches,
on other numbers of processes, and after a resume.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from reasonrec.recipes.decoding.backbone import all_done
from reasonrec.recipes.decoding.branches import Lanes
from reasonrec.recipes.decoding.chain_writers import TEXT_ROWS, ChainWriter, Written, read_chains
from reasonrec.recipes.decoding.prefix import Prefix, padded, read
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.rows import text_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from reasonrec.recipes.decoding.answers import Answers

Step = tuple[Tensor, Tensor, Tensor, Tensor]  # token, log-probability, chosen, written: (prompts, lanes) each
# Told what each step of the chains wrote, (prompts, generations) with -1 where a chain has ended; says which prompts,
# (prompts,), nobody waits for any more: their chains are cut.
Stream = Callable[[NDArray[np.int64]], NDArray[np.bool_]]
_LISTS, _ARRAYS = ("prompt_ids", "completion_ids", "mask", "log_probs"), ("items", "chain", "cut", "given", "gap")


@dataclass(frozen=True)
class Sampler:
    """How completions are drawn.

    Attributes:
        generations: Completions per prompt.
        temperature: What logits are divided by.
        max_chain: Longest chain in tokens; 0 is direct mode, in which the prompt has to end with the begin marker.
        close_ids: Token ids of the delimiter that ends a chain; without any, only the begin marker does.
        greedy: Take the most probable token instead of drawing one.
        batch: Prompts that are rolled out at a time.
        stream: Told every step of `write_chains`.
    """

    generations: int
    temperature: float = 1.0
    max_chain: int = 0
    close_ids: tuple[int, ...] = ()
    greedy: bool = False
    batch: int = 64
    stream: Stream | None = None

    def __post_init__(self) -> None:
        if self.generations < 1 or self.batch < 1 or self.max_chain < 0:
            raise UserError(
                f"generations={self.generations} and batch={self.batch} have to be at least 1, "
                f"max_chain={self.max_chain} at least 0"
            )
        if not self.temperature > 0:
            raise UserError(f"temperature={self.temperature} has to be above 0")


@dataclass
class Rollouts:
    """Completions, the generations of a prompt one after the other.

    Attributes:
        prompt_ids: Token ids of each row's prompt.
        completion_ids: Token ids of each completion; the last one ends the sequence.
        mask: 1 for tokens that the policy chose, 0 for those that were forced.
        log_probs: Log-probability of each token when it was drawn; 0 for forced ones.
        items: (rows,) int64 item of each answer.
        chain: (rows,) int64 tokens that were drawn for each chain, its delimiter included; 0 in direct mode.
        cut: (rows,) bool; whether the chain had to be cut.
        given: (rows,) int64 codes that the answer was given to begin with; `mask` and `log_probs` treat them as drawn.
        gap: (rows,) how far another engine's log-probabilities of a chain are from these; NaN where none gave any.
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    mask: list[list[int]]
    log_probs: list[list[float]]
    items: np.ndarray
    chain: np.ndarray
    cut: np.ndarray
    given: np.ndarray
    gap: np.ndarray

    def __len__(self) -> int:
        return len(self.completion_ids)

    def opened(self, begin_id: int) -> np.ndarray:
        """Where the answer behind each chain begins, in its completion: (rows,)."""
        return np.array([ids.index(begin_id) + 1 for ids in self.completion_ids])

    def take(self, rows: Sequence[int] | np.ndarray) -> Rollouts:
        """Some rows, in the order given."""
        picked: dict[str, Any] = {name: [getattr(self, name)[row] for row in rows] for name in _LISTS}
        index = np.asarray(rows, dtype=np.int64)
        return Rollouts(**picked, **{name: getattr(self, name)[index] for name in _ARRAYS})

    @classmethod
    def join(cls, parts: Sequence[Rollouts]) -> Rollouts:
        """Several, one after the other."""
        joined: dict[str, Any] = {name: [row for part in parts for row in getattr(part, name)] for name in _LISTS}
        arrays: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _ARRAYS}
        return cls(**joined, **arrays)


def noise(seed: int, step: int, prompts: Sequence[int] | np.ndarray, generations: int, tokens: int) -> np.ndarray:
    """Uniform numbers that decide what is drawn.

    Args:
        seed: Seed of the run.
        step: Number of the generation step.
        prompts: Number of each prompt in the data.
        generations: Completions per prompt.
        tokens: Most tokens that are drawn in a completion.

    Returns:
        (prompts, generations, tokens) float64 in [0, 1); each depends on its own prompt and place only.
    """
    drawn = [np.random.default_rng([seed, step, prompt]).random((generations, tokens)) for prompt in prompts]
    return np.stack(drawn)


def draw(log_probs: Tensor, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
    """Draw one column of each row by inverting the distribution function; the most probable one without noise.

    Args:
        log_probs: (rows, columns) normalised, -inf where impossible.
        uniform: (rows,) noise in [0, 1).

    Returns:
        Columns and their log-probabilities, each (rows,).
    """
    if uniform is None:
        column = log_probs.argmax(-1)
    else:
        reached = log_probs.double().exp().cumsum(-1)
        # Scaled by what the sum really is, so that rounding never leads behind the last possible column.
        column = torch.searchsorted(reached, uniform[:, None] * reached[:, -1:], right=True)[:, 0]
        column = column.clamp(max=log_probs.shape[1] - 1)
    return column, log_probs.gather(1, column[:, None])[:, 0]


@torch.no_grad()
def roll_out(
    model: PreTrainedModel,
    answers: Answers,
    prompts: Sequence[Sequence[int]],
    sampler: Sampler,
    *,
    eos_ids: Sequence[int],
    pad_id: int,
    noise: np.ndarray | None = None,
    given: Sequence[Sequence[int]] | None = None,
    writer: ChainWriter | None = None,
) -> Rollouts:
    """Write completions.

    Args:
        model: Causal LM, or its PEFT wrapper's base model, in evaluation mode.
        answers: The policy's answers, on the model's device.
        prompts: Token ids of each prompt; in direct mode they end with the begin marker.
        sampler: How to draw.
        eos_ids: Tokens that end a sequence, the one that completions are ended with first.
        pad_id: Token to pad with.
        noise: (prompts, generations, max_chain + longest answer) uniform numbers; not needed if greedy.
        given: Tokens of the codes that every answer to each prompt begins with, of a policy `with_tree`.
        writer: Another engine that writes the chains; this sampler if none is given.

    Returns:
        prompts × generations rows.

    Raises:
        UserError: If a prompt of direct mode does not end with the begin marker, or the model cannot be searched.
        FloatingPointError: If the model returns NaN, or logits that leave no distribution.
    """
    if not sampler.max_chain and any(prompt[-1] != answers.begin_id for prompt in prompts):
        raise UserError("in direct mode (max_chain=0) every prompt has to end with the begin marker")
    if not sampler.greedy and noise is None:
        raise ValueError("drawing needs noise")
    uniform = None if sampler.greedy or noise is None else torch.from_numpy(noise).to(model.device)
    parts = []
    for begin in range(0, len(prompts), sampler.batch):
        chunk = [list(prompt) for prompt in prompts[begin : begin + sampler.batch]]
        part = None if uniform is None else uniform[begin : begin + sampler.batch]
        known = [()] * len(chunk) if given is None else given[begin : begin + sampler.batch]
        elsewhere = None
        if writer is not None and sampler.max_chain:
            decides = None if part is None else part[..., : sampler.max_chain].cpu().numpy()
            elsewhere = writer.write(chunk, sampler, stop_ids=[*eos_ids, answers.begin_id], noise=decides)
        parts.append(_roll_out_batch(model, answers, chunk, sampler, eos_ids, pad_id, part, known, elsewhere))
    rollouts = Rollouts.join(parts)
    if not all(np.isfinite(row).all() for row in rollouts.log_probs):  # infinite logits leave no distribution
        raise FloatingPointError("a log-probability of the rollouts is not finite")
    return rollouts


def _start(model: PreTrainedModel, prompts: list[list[int]], sampler: Sampler, pad_id: int, longest: int) -> Lanes:
    """Read the prompts once, with room for what every lane may write."""
    input_ids, mask = padded(prompts, pad_id, model.device)
    ahead = longest + (sampler.max_chain + len(sampler.close_ids) + 1 if sampler.max_chain else 0)
    prefix = read(model, input_ids, mask, room=ahead * sampler.generations, ahead=ahead)
    return Lanes(model, prefix, sampler.generations)


@dataclass(frozen=True)
class Chains:
    """What was thought before an answer.

    Attributes:
        prefix: What was read: a row for each chain, those of a prompt one after the other, the begin marker last.
        token_ids: Token ids of each chain, forced ones included, without the begin marker.
        chain: (rows,) int64 tokens that were drawn for each.
        cut: (rows,) bool; whether the chain had to be cut.
    """

    prefix: Prefix
    token_ids: list[list[int]]
    chain: np.ndarray
    cut: np.ndarray


@torch.no_grad()
def write_chains(
    model: PreTrainedModel,
    answers: Answers,
    prompts: Sequence[Sequence[int]],
    sampler: Sampler,
    *,
    eos_ids: Sequence[int],
    pad_id: int,
    room: int,
    noise: np.ndarray | None = None,
) -> Chains:
    """Write the chains of one batch of prompts and stop in front of the answers, to search for them.

    Args:
        model: Causal LM, or its PEFT wrapper's base model, in evaluation mode.
        answers: The policy's answers.
        prompts: Token ids of each prompt, the opening delimiter last.
        sampler: How to draw, with a `max_chain` above 0.
        eos_ids: Tokens that end a sequence.
        pad_id: Token to pad with.
        room: Slots to keep behind each chain (`Answers.room`).
        noise: (prompts, generations, at least max_chain) uniform numbers; not needed if greedy.

    Raises:
        UserError: If the model cannot be searched, or its context is too short.
        FloatingPointError: If the model returns NaN.
    """
    # An item has to fit behind the chain.
    state = _start(model, [list(prompt) for prompt in prompts], sampler, pad_id, answers.longest)
    uniform = None if sampler.greedy or noise is None else torch.from_numpy(noise).to(model.device)
    steps: list[Step] = []
    chain, cut = _write_chains(state, answers.begin_id, sampler, eos_ids, uniform, steps)
    token, _, _, written = (torch.stack(part, -1).flatten(0, 1).cpu().numpy() for part in zip(*steps, strict=True))
    ids = [token[row][written[row]].tolist() for row in range(len(token))]
    return Chains(
        state.prefixes(room),
        [row[: row.index(answers.begin_id)] for row in ids],
        chain.flatten().cpu().numpy(),
        cut.flatten().cpu().numpy(),
    )


def _roll_out_batch(
    model: PreTrainedModel,
    answers: Answers,
    prompts: list[list[int]],
    sampler: Sampler,
    eos_ids: Sequence[int],
    pad_id: int,
    uniform: Tensor | None,
    given: Sequence[Sequence[int]],
    elsewhere: Written | None,
) -> Rollouts:
    steps: list[Step] = []
    gap = np.full(len(prompts) * sampler.generations, np.nan)
    if elsewhere is None:
        state = _start(model, prompts, sampler, pad_id, answers.longest)
    else:  # a lane for each, one below the other
        state, chain, cut, gap = read_chains(model, answers, prompts, elsewhere, sampler, eos_ids, pad_id, steps)
        uniform = None if uniform is None else uniform.flatten(0, 1)[:, None]
    device, shape = model.device, state.position.shape
    if any(given):
        rows_given = [torch.tensor(codes, dtype=torch.int64) for codes in given]
        state.given = pad_sequence(rows_given, batch_first=True, padding_value=-1).to(device)
        state.given = state.given.repeat_interleave(shape[0] // len(prompts), 0)
    if not sampler.max_chain:
        chain, cut = torch.zeros(shape, dtype=torch.int64, device=device), torch.zeros(shape, dtype=torch.bool)
    elif elsewhere is None:
        chain, cut = _write_chains(state, answers.begin_id, sampler, eos_ids, uniform, steps)
    item = answers.write(state, sampler, uniform, steps)
    end = torch.full(shape, eos_ids[0], device=device)
    steps.append((end, torch.zeros(shape, device=device), torch.zeros_like(end).bool(), torch.ones_like(end).bool()))
    tokens, gains, chosen, written = (
        torch.stack(part, -1).flatten(0, 1).cpu().numpy() for part in zip(*steps, strict=True)
    )
    rows = range(len(tokens))
    return Rollouts(
        prompt_ids=[prompt for prompt in prompts for _ in range(sampler.generations)],
        completion_ids=[tokens[row][written[row]].tolist() for row in rows],
        mask=[chosen[row][written[row]].astype(int).tolist() for row in rows],
        log_probs=[np.where(chosen[row], gains[row], 0.0)[written[row]].tolist() for row in rows],
        items=item.flatten().cpu().numpy(),
        chain=chain.flatten().cpu().numpy(),
        cut=cut.flatten().cpu().numpy(),
        given=np.repeat([len(codes) for codes in given], sampler.generations),
        gap=gap,
    )


def _write_chains(
    state: Lanes,
    begin_id: int,
    sampler: Sampler,
    eos_ids: Sequence[int],
    uniform: Tensor | None,
    steps: list[Step],
) -> tuple[Tensor, Tensor]:
    """Let every lane write its chain and read its begin marker; returns the chains' lengths and which were cut."""
    shape, device = state.position.shape, state.position.device
    # Where the end of a sequence is what opens answers, it ends no chain before its time.
    ends = torch.tensor([token for token in eos_ids if token != begin_id], dtype=torch.int64, device=device)
    close = torch.tensor(sampler.close_ids, dtype=torch.int64, device=device)
    writing = torch.ones(shape, dtype=torch.bool, device=device)
    begun, cut = ~writing, ~writing
    chain = torch.zeros(shape, dtype=torch.int64, device=device)
    for step in range(sampler.max_chain):
        row, lane = writing.nonzero(as_tuple=True)
        if all_done(len(row)):
            break
        token, gain = torch.zeros_like(chain), torch.zeros(shape, device=device)
        for r, g in zip(row.split(TEXT_ROWS), lane.split(TEXT_ROWS), strict=True):
            logits = text_logits(state.model, state.hidden[r, g]) / sampler.temperature
            check_finite(logits, f"token {step} of the chains")
            part = None if uniform is None else uniform[r, g, step]
            token[r, g], gain[r, g] = draw(logits.log_softmax(-1), part)
        steps.append((token, gain, writing, writing))
        state.feed(token, writing)
        opens = writing & (token == begin_id)
        chain = chain + (writing & ~opens)
        begun, cut = begun | opens, cut | (writing & torch.isin(token, ends))
        if sampler.stream is not None:
            left = sampler.stream(torch.where(writing & ~opens, token, -1).cpu().numpy())
            cut = cut | (writing & ~opens & torch.from_numpy(left).to(device)[:, None])
        writing = writing & ~opens & ~cut & ~_closes([written[0] for written in steps[-len(close) :]], close)
    cut = cut | writing
    for forced, lanes in [*((int(t), cut) for t in close), (begin_id, ~begun)]:
        if not all_done(int(lanes.sum())):
            token = torch.full(shape, forced, device=device)
            steps.append((token, torch.zeros(shape, device=device), torch.zeros_like(lanes), lanes))
            state.feed(token, lanes)
    return chain, cut


def _closes(tokens: list[Tensor], close: Tensor) -> Tensor:
    """Whether the last tokens of each lane are the closing delimiter; lanes that write on have one token per step."""
    if len(close) == 0 or len(tokens) < len(close):
        return torch.zeros_like(tokens[-1], dtype=torch.bool)
    return (torch.stack(tokens[-len(close) :], -1) == close).all(-1)


def check_finite(logits: Tensor, where: str) -> None:
    """Check logits that are drawn from.

    Raises:
        FloatingPointError: If one is NaN; the message says where.
    """
    if bool(torch.isnan(logits).any()):
        raise FloatingPointError(f"the model returned NaN logits at {where} of the rollouts")
