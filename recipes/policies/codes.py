"""What policies have in common whose items are codes, new tokens: prompts, rows, parsing, and reading chains."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor

from reasonrec.data_gen.tasks.prompts import Prompter, Prompts
from reasonrec.recipes.models.checkpoint import Setting
from reasonrec.recipes.models.load import resize
from reasonrec.recipes.policies.base import Policy
from reasonrec.rewards.parse import Parser
from reasonrec.tokenizers.index import ItemIndex
from reasonrec.tokenizers.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def split_codes(
    vocabulary: Vocabulary, input_ids: Tensor, labels: Tensor, answers_only: bool
) -> tuple[Tensor, Tensor]:
    """Which labels are answers, and which are words, for items that are written as codes; see `Answers.split`.

    In rollouts only codes behind the begin marker are answers: a chain may name items, but writes them as free text.
    Of supervised examples every code is one, except for codes before the answer of an example that supervises words as
    well: those are part of a chain.

    Args:
        vocabulary: Where the codes stand.
        input_ids: (batch, length) token ids.
        labels: (batch, length) the same where there is a loss, -100 elsewhere.
        answers_only: Whether these are rollouts.

    Returns:
        Two masks (batch, length - 1) of the positions 1, 2, …
    """
    target = labels[:, 1:]
    mask = target != -100
    is_code = mask & (target >= vocabulary.first_id) & (target < vocabulary.size)
    is_text = mask & ~is_code
    answer = (input_ids[:, :-1] == vocabulary.begin_id).cummax(1).values  # behind a begin marker
    if answers_only:
        return is_code & answer, mask & ~answer
    named = is_code & is_text.any(1, keepdim=True) & ~answer
    return is_code & ~named, is_text | named


class CodePolicy(Policy):
    """A policy whose items are codes; its answers have a `vocabulary`, which says where they stand.

    Attributes:
        key: What of an item's tokens stands for it in a chain: the sequence, or the set of them.
    """

    with_codes = True
    key: ClassVar[Callable[[Sequence[int]], Hashable]] = tuple
    answers: Any

    @staticmethod
    def code_prompts(
        tokenizer: PreTrainedTokenizerBase, setting: Setting, vocabulary: Vocabulary, index: ItemIndex
    ) -> Prompts:
        """How histories of items are read that are written as codes."""
        return Prompts(
            Prompter(tokenizer, chat=setting.chat, system=setting.system),
            setting.history_prompt,
            vocabulary.item_token_ids(index.codes),
            vocabulary.begin_id,
            tokenizer.eos_token_id,
        )

    @property
    def index(self) -> ItemIndex:
        """The codes."""
        return self.catalogue.codes

    @property
    def vocabulary(self) -> Vocabulary:
        """Where the codes stand."""
        vocabulary: Vocabulary = self.answers.vocabulary
        return vocabulary

    @property
    def new_tokens(self) -> list[int]:
        """The begin marker, the codes, and what else the vocabulary has."""
        return self.vocabulary.token_ids

    def resize(self, model: PreTrainedModel) -> None:
        """Make room for the rows."""
        resize(model, self.vocabulary)

    def code_parser(self, vocabulary: Vocabulary, *, reasoning: bool) -> Parser:
        """See `rewards.parse`.

        Args:
            vocabulary: Where the codes stand, and nothing else.
            reasoning: Whether completions start with a chain.
        """
        return Parser(
            vocabulary,
            self.index,
            reasoning=reasoning,
            opened=not reasoning,
            close_ids=self.prompts.close_ids if reasoning else (),
            end_ids={self.tokenizer.eos_token_id, self.tokenizer.pad_token_id},
        )

    @cached_property
    def tuples(self) -> list[tuple[int, ...]]:
        """The codes of each item; see `ItemIndex.tuples`."""
        return self.index.tuples()

    def columns(self, items: Sequence[int] | np.ndarray) -> dict[str, Any]:
        """Codes of the targets, and how many an item has."""
        return {"target_codes": [self.tuples[item] for item in items], "depth": self.index.depth}

    def without_items(self, chain: Sequence[int]) -> list[int]:
        """The words alone."""
        return [token for token in chain if token < self.vocabulary.first_id]

    @cached_property
    def _names(self) -> dict[Hashable, str]:
        """The title of the item that tokens stand for."""
        titles = self.catalogue.titles
        return {type(self).key(ids): titles[item] for item, ids in enumerate(self.prompts.item_token_ids)}

    def readable(self, chain: Sequence[int]) -> str:
        """Words, and a title in place of the codes of an item."""
        names, tokenizer, key = self._names, self.tokenizer, type(self).key
        longest = self.answers.longest
        parts: list[str] = []
        words: list[int] = []
        place = 0
        while place < len(chain):
            lengths = (n for n in range(longest, 0, -1) if key(chain[place : place + n]) in names)
            if n := next(lengths, 0):
                parts += [str(tokenizer.decode(words)), f" [{names[key(chain[place : place + n])]}]"]
                words = []
            else:
                words.append(chain[place])
            place += max(n, 1)
        return "".join([*parts, str(tokenizer.decode(words))]).strip()
