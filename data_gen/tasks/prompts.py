"""Prompts as token ids: all that inference needs, and what training begins its examples with.

A template is text with named places, such as `History:{history}`. Only the template itself is prompt syntax: what
fills a place is either item token ids, or text that is tokenised as plain text, so a title can never become a control
token.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import numpy as np

from reasonrec.data_gen.clean import neutralise
from reasonrec.tokenizers.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Items = Sequence[int] | np.ndarray
Example = tuple[list[int], list[int]]  # token ids, and labels with -100 where there is no loss
# The shipped history prompt is as short as can be: on a CPU every prompt token costs as much as an item's code.
HISTORY = "History:{history}"
# Around a chain of thought. Ordinary text; a tokenizer that has them as tokens of their own uses those.
THINK, THOUGHT = "<think>", "</think>"
_PLACE = "\x00"


class Prompter:
    """Fills templates.

    Args:
        tokenizer: The LLM's tokenizer with the code tokens.
        chat: Put every prompt into the tokenizer's chat template as a user turn (for instruction-tuned models that
            have to keep their manners); off, the template's text is all there is.
        system: System message of the chat template, if any.

    Attributes:
        syntax: Token ids of text that is syntax, remembered.

    Raises:
        UserError: If `chat` is on and the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, chat: bool = False, system: str | None = None) -> None:
        self.tokenizer = tokenizer
        self._head: list[int] = []
        self._tail: list[int] = []
        if chat:
            if not tokenizer.chat_template:
                raise UserError("chat=true, but the model's tokenizer has no chat template: set chat: false")
            messages = [{"role": "system", "content": system}] if system is not None else []
            messages.append({"role": "user", "content": _PLACE})
            whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            head, tail = whole.split(_PLACE)
            self._head, self._tail = self._syntax(head), self._syntax(tail)
        elif tokenizer.bos_token_id is not None and tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id:
            self._head = [tokenizer.bos_token_id]
        self.syntax = lru_cache(maxsize=None)(lambda text: tuple(self._syntax(text)))

    def _syntax(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def data(self, text: str) -> list[int]:
        """Token ids of text that must not be read as syntax."""
        return list(self.tokenizer(neutralise(text), add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def __call__(self, template: str, values: Mapping[str, str | Sequence[int]]) -> list[int]:
        """Token ids of a prompt.

        Args:
            template: Text with places in braces.
            values: What fills each place: text, or token ids.

        Raises:
            UserError: If the template names a place that has no value, or is malformed.
        """
        ids = list(self._head)
        for literal, place in _pieces(template):
            ids.extend(self.syntax(literal))
            if place is None:
                continue
            if place not in values:
                raise UserError(
                    f"prompt {template!r} has the place {{{place}}}; known are {', '.join(sorted(values))}"
                )
            value = values[place]
            ids.extend(self.data(value) if isinstance(value, str) else value)
        return ids + self._tail


@dataclass(frozen=True)
class Prompts:
    """How a history is read, in both modes, and what an answer to it is.

    Here an item reads and answers alike, with the same tokens; a policy for which that is not so says otherwise.

    Attributes:
        prompter: Fills templates.
        history_prompt: The template that histories are read with.
        item_token_ids: Token ids of each item, in a history or a chain.
        begin_id: The begin marker, which opens an answer.
        eos_id: What ends a text answer.
    """

    prompter: Prompter
    history_prompt: str
    item_token_ids: Sequence[list[int]]
    begin_id: int
    eos_id: int

    def item_ids(self, items: Items) -> list[int]:
        """Token ids of several items, one after the other."""
        return [token for item in items for token in self.item_token_ids[item]]

    def answer(self, item: int) -> list[int]:
        """Token ids that answer with an item, behind the begin marker."""
        return self.item_token_ids[item]

    def sequence(self, history: Items, target: int) -> Example:
        """A history and its continuation, with the loss on every item."""
        prompt, ids = self.direct(history), self.item_ids(history)
        labels, begin = [-100] * len(prompt), len(self.direct_parts()[0])
        labels[begin : begin + len(ids)] = ids
        return prompt + self.answer(target), labels + self.answer(target)

    def words(self, text: str, limit: int) -> list[int]:
        """Token ids of a text that stands behind other words, cut after so many."""
        return self.prompter.data(" " + text)[:limit]

    def direct(self, history: Items) -> list[int]:
        """Prompt of the direct mode: the history, and the begin marker."""
        return [*self._history(self.item_ids(history)), self.begin_id]

    def direct_parts(self) -> tuple[list[int], list[int]]:
        """What `direct` has in front of the history's items, and behind them."""
        whole = [*self._history([-1]), self.begin_id]
        place = whole.index(-1)
        return whole[:place], whole[place + 1 :]

    def reasoning(self, history: Items) -> list[int]:
        """Prompt of the reasoning mode: the history, and the opening delimiter in place of the begin marker."""
        return [*self._history(self.item_ids(history)), *self.think_ids]

    def behind(self, history: Items, chain: Sequence[int]) -> list[int]:
        """Prompt of the reasoning mode with a chain, closing delimiter included, and the begin marker last."""
        return [*self.reasoning(history), *chain, self.begin_id]

    @property
    def think_ids(self) -> tuple[int, ...]:
        """Token ids of the opening delimiter."""
        return self.prompter.syntax(THINK)

    @property
    def close_ids(self) -> tuple[int, ...]:
        """Token ids of the closing delimiter."""
        return self.prompter.syntax(THOUGHT)

    @property
    def answer_opening_ids(self) -> list[int]:
        """What ends a chain and opens its answer: the closing delimiter and the begin marker."""
        return [*self.close_ids, self.begin_id]

    def _history(self, ids: list[int]) -> list[int]:
        return self.prompter(self.history_prompt, {"history": ids})


@cache
def _pieces(template: str) -> tuple[tuple[str, str | None], ...]:
    try:
        return tuple((literal, place) for literal, place, _, _ in string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"prompt {template!r}: {error}; write {{{{ for a brace") from error


def check_history_prompt(template: str) -> None:
    """Check the template that histories are read and recommended with.

    Raises:
        UserError: If it does not have exactly the place `{history}`.
    """
    check_prompt("history_prompt", template, "history")


def check_prompt(key: str, template: str, place: str) -> None:
    """Check a template that has one place.

    Args:
        key: The configuration's key, for the message.
        template: The template.
        place: Its place.

    Raises:
        UserError: If it does not have exactly this place.
    """
    places = [found for _, found in _pieces(template) if found is not None]
    # The count: `{history!r}` names the place too, but nothing would apply the conversion.
    if places != [place] or template.count(f"{{{place}}}") != 1:
        raise UserError(f"{key}={template!r} has to contain {{{place}}} once and no other place")
