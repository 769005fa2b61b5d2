"""REG4Rec's parallel codes as a policy: the LLM reads and writes items as sets of codes.

What the paper (arXiv 2508.15308) leaves open, decided here:

- **Order in training**: drawn anew for every item of every example, since the set has none; at inference, items of a
  history are read in the order of the codebooks.
- **Confidence of CRSS**: the softmax over the whole codebook, before any temperature.
- **The order in the probability**: none of `crss` or `ordered`, where the prefix or the item's order fixes it; that of
  `free` chooses the codebook with the code.
- **Equal sets**: there are none, by `unique: reassign` of the index. Codes may come from any quantizer, so that
  residual ones can be compared (the paper's ablation of MPQ); they are trained and ranked as a set all the same.
- **Category**: the first that an item lists, as rows of the LLM's head; items without one have no such loss.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from reasonrec.data_gen.tasks.prompts import Example, Prompts
from reasonrec.data_gen.tasks.reasoning import Mention
from reasonrec.data_gen.tasks.render import Examples
from reasonrec.recipes.models.checkpoint import Setting
from reasonrec.recipes.models.load import add_code_rows
from reasonrec.recipes.policies.base import POLICIES, Parse
from reasonrec.recipes.policies.codes import CodePolicy
from reasonrec.recipes.policies.parallel_codes.answers import SetAnswers
from reasonrec.recipes.policies.parallel_codes.laws import Law
from reasonrec.rewards.parse import Parsed
from reasonrec.tokenizers.catalogue import Catalogue
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.registry import check_options
from reasonrec.tokenizers.terminal import say, shown
from reasonrec.tokenizers.vocabulary import BEGIN, Vocabulary, code_token
from reasonrec.tokenizers.whole import whole

if TYPE_CHECKING:
    import polars as pl
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from reasonrec.data_gen.reasoning.traces import Trace
    from reasonrec.data_gen.sequences import Sequences
    from reasonrec.recipes.decoding.sample import Rollouts


@dataclass(frozen=True)
class ParallelOptions:
    """The policy's own options.

    Attributes:
        law: What comes next (`laws`): `crss`, `ordered` or `free`.
        orders: Of `ordered`: orders shared by all items, over which probabilities are averaged. The first is that of
            the codebooks; each further one costs as much again, and rescoring what they propose.
        category_weight: λ of the category head's loss; 0 leaves the head out.
    """

    law: Law = "crss"
    orders: int = 1
    category_weight: float = 0.1

    def __post_init__(self) -> None:
        if self.law not in get_args(Law):
            raise UserError(f"law={shown(self.law)}: choose {', '.join(get_args(Law))}")
        whole("orders", self.orders, at_least=1)
        if self.orders > 1 and self.law != "ordered":
            raise UserError(f"orders={self.orders} are averaged under law: ordered, not under {self.law}")
        weight = self.category_weight
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
            raise UserError(f"category_weight={shown(weight)} has to be a finite number, at least 0")

    @classmethod
    def read(cls, options: dict[str, Any]) -> ParallelOptions:
        """The options of a configuration.

        Raises:
            UserError: If there is no such option, or a value is wrong.
        """
        check_options("the policy parallel_codes", options, [item.name for item in fields(cls)])
        return cls(**options)


@dataclass(frozen=True)
class ShuffledExamples(Examples):
    """Examples in which the codes of every item stand in an order drawn for it; the same line has the same orders.

    Attributes:
        first_id: Token id of the first code.
        end_id: Token id behind the last one.
        depth: Codes of an item.
    """

    first_id: int = 0
    end_id: int = 0
    depth: int = 1

    def render(self, task: int, source: int, start: int, stop: int, shuffle: int, variant: int) -> Example:
        """See `Examples`."""
        ids, labels = super().render(task, source, start, stop, shuffle, variant)
        tokens, wanted = np.array(ids), np.array(labels)
        codes = np.flatnonzero((tokens >= self.first_id) & (tokens < self.end_id)).reshape(-1, self.depth)
        rng = np.random.default_rng([task, source, start, stop, shuffle + 1, variant])
        order = rng.permuted(codes, axis=1)
        tokens[codes], wanted[codes] = tokens[order], wanted[order]
        return tokens.tolist(), wanted.tolist()


class ParallelCodes(CodePolicy):
    """The LLM reads and writes items as sets of codes, which are new tokens."""

    name, gives = "parallel_codes", ("category_probs",)
    key = frozenset
    answers: SetAnswers

    def __init__(
        self,
        catalogue: Catalogue,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Prompts,
        answers: SetAnswers,
        options: ParallelOptions,
    ) -> None:
        super().__init__(catalogue, tokenizer, prompts, answers)
        self.options = options

    @classmethod
    def build(cls, catalogue: Catalogue, setting: Setting, tokenizer: PreTrainedTokenizerBase) -> ParallelCodes:
        """See `Policy`.

        Raises:
            UserError: If the items have no codes, or some share all of them, or an option is wrong.
        """
        options, index = ParallelOptions.read(setting.policy_options), catalogue.codes
        none = np.full(catalogue.n_items, -1)
        category = catalogue.categories if options.category_weight else none
        count = int(category.max()) + 1
        if count < 2:  # nothing to tell apart
            count, category = 0, none
        *sizes, _ = index.level_sizes
        known = tokenizer.get_vocab()
        if BEGIN in known:  # a model that was trained, whose items may have been published without their texts
            trained = sum(code_token(index.depth, number) in known for number in range(len(known)))
            count, category = trained, category if trained == count else none
        orders = np.tile(np.arange(index.depth), (options.orders, 1))
        orders[1:] = np.random.default_rng(0).permuted(orders[1:], axis=1)
        vocabulary = Vocabulary.extend(tokenizer, [*sizes, count])
        answers = SetAnswers(index, vocabulary, options.law, orders, category, options.category_weight)
        prompts = cls.code_prompts(tokenizer, setting, vocabulary, index)
        return cls(catalogue, tokenizer, prompts, answers, options)

    def start(self, model: PreTrainedModel) -> None:
        """Add the rows of codes and categories, each from the text of its items, and say what is left to choose."""
        texts = self.catalogue.texts("title", "category", "brand")
        codes = np.concatenate([self.index.codes[:, :-1], self.answers.category.cpu().numpy()[:, None]], 1)
        add_code_rows(model, self.tokenizer, self.vocabulary, codes, texts)
        depth = self.index.depth
        say(f"of the {depth} steps of an item, {self.answers.sets.unforced():.2f} leave a choice in a random order")
        if self.options.category_weight and not self.answers.n_categories:
            say(
                "items have no category: the category head is left out, and rewards of categories have nothing to read"
            )

    def card(self) -> dict[str, str]:
        """How many codes there are, and what orders them."""
        *sizes, _ = self.index.level_sizes
        return {"item codes": f"sets of {len(sizes)}, from {' + '.join(map(str, sizes))}; law {self.options.law}"}

    def measured(self) -> dict[str, float]:
        """The mean loss of the category head in training."""
        total, count = self.answers.guessed
        return {"category_loss": float(total) / count} if count else {}

    def examples(
        self,
        train: pl.DataFrame | Sequences,
        *,
        one_per_prefix: bool,
        traces: Sequence[Trace] = (),
        mention: Mention = "codes",
        set_order: bool = False,
    ) -> Examples:
        """See `Policy`; the codes of every item in an order of their own."""
        plain = super().examples(
            train, one_per_prefix=one_per_prefix, traces=traces, mention=mention, set_order=set_order
        )
        given = {item.name: getattr(plain, item.name) for item in fields(plain)}
        first, sets = self.vocabulary.first_id, self.answers.sets
        return ShuffledExamples(**given, first_id=first, end_id=first + sets.n_columns, depth=sets.depth)

    def parser(self, *, reasoning: bool) -> Parse:
        """See `rewards.parse`, for codes in any order."""
        vocabulary = Vocabulary(self.index.level_sizes, self.vocabulary.begin_id)  # without the categories
        inner = self.code_parser(vocabulary, reasoning=reasoning)
        first, end = self.vocabulary.first_id, self.vocabulary.first_id + self.answers.sets.n_columns

        def in_order(ids: Sequence[int]) -> list[int]:
            found = list(ids)
            start = found.index(self.vocabulary.begin_id) + 1 if reasoning and self.vocabulary.begin_id in found else 0
            stop = start
            while stop < len(found) and first <= found[stop] < end:
                stop += 1
            return found[:start] + sorted(found[start:stop]) + found[stop:]

        def parse(completion_ids: Sequence[Sequence[int]], cut: Sequence[bool] | None = None) -> Parsed:
            return inner([in_order(ids) for ids in completion_ids], cut)

        return parse

    def levels(self, predicted: Parsed, target: np.ndarray) -> np.ndarray:
        """Codes shared with the target, whatever their order."""
        pairs = zip(predicted.predicted_codes or [], (self.tuples[item] for item in target), strict=True)
        return np.array([sum(a == b for a, b in zip(p, t, strict=True)) if p else 0 for p, t in pairs], dtype=np.int64)

    def observed(self, model: PreTrainedModel, rollouts: Rollouts, wanted: Collection[str]) -> dict[str, Any]:
        """What the category head says in front of each code: (M, categories) of each rollout.

        Raises:
            UserError: If a reward wants that, and there is no category head.
        """
        if "category_probs" not in wanted:
            return {}
        if not self.answers.n_categories:
            raise UserError(
                "a reward requires category_probs, and the model has no category head: give the items categories and "
                "train with category_weight above 0"
            )
        found = self.answers.category_probs(model, rollouts.prompt_ids, rollouts.completion_ids)
        return {"category_probs": found}


POLICIES.add(ParallelCodes.name, ParallelCodes, __name__)
