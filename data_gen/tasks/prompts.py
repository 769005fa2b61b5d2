"""Prompts as token ids.

A template is text with named places, such as `History:{history}`. Only the template itself is prompt syntax: what
fills a place is either item token ids, or text that is tokenised as plain text, so a title can never become a control
token.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING

from reasonrec.data_gen.clean import neutralise
from reasonrec.tokenizers.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The shipped history prompt is as short as can be: on a CPU every prompt token costs as much as an item's code.
HISTORY = "History:{history}"

# Each alignment task has several phrasings, so that the model learns the task and not one sentence. No space
# stands before a place: text brings its own, as a word and the space before it are one token; codes need none.
TEMPLATES: dict[str, tuple[str, ...]] = {
    # an item's words -> its codes
    "item2index": (
        "Item named{title}:",
        "Which item is this?{text}\nItem:",
        "Find the item for the name{title}. Item:",
    ),
    # an item's codes -> its title
    "index2item": (
        "Item:{item}\nName:",
        "What is{item} called?\nName:",
        "Give the name of the item{item}.\nName:",
    ),
    # a history in codes -> the title of the next item
    "history2title": (
        "History:{history}\nName of the next item:",
        "These were chosen, oldest first:{history}\nThe next one is called:",
    ),
    # a history in titles -> the codes of the next item
    "titles2index": (
        "Chosen so far, oldest first:{titles}\nNext:",
        "Someone went from{titles} to:",
    ),
}

_PLACE = "\x00"


class Prompter:
    """Fills templates.

    Args:
        tokenizer: The LLM's tokenizer with the code tokens.
        chat: Put every prompt into the tokenizer's chat template as a user turn (for instruction-tuned models that
            have to keep their manners); off, the template's text is all there is.
        system: System message of the chat template, if any.

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
        self._syntax_cached = lru_cache(maxsize=None)(lambda text: tuple(self._syntax(text)))

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
            ids.extend(self._syntax_cached(literal))
            if place is None:
                continue
            if place not in values:
                raise UserError(
                    f"prompt {template!r} has the place {{{place}}}; known are {', '.join(sorted(values))}"
                )
            value = values[place]
            ids.extend(self.data(value) if isinstance(value, str) else value)
        return ids + self._tail


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
    places = [place for _, place in _pieces(template) if place is not None]
    # The count: `{history!r}` names the place too, but nothing would apply the conversion.
    if places != ["history"] or template.count("{history}") != 1:
        raise UserError(f"history_prompt={template!r} has to contain {{history}} once and no other place")
