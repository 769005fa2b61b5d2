"""Reasoning traces as supervised examples.

The chain stands between the history and the begin marker, inside think delimiters, as one short sentence a stage:

    History:⟨items⟩<think> Evidence: War⟨item⟩. Taste: War. Wants: Comedy. Next: … Keep: …</think>⟨begin⟩⟨item⟩

Tasks:
    reason: the whole of it, with the loss on the chain and on the answer.
    evidence, preference, intent, formulation, rewriting: one stage each; half of them as its sentence in the chain,
        after those before it, the other half as the answer to a question of its own.
    itemsearch: what someone wants, in words (and the history), to the item.
    preferenceobtain: the history to the lasting taste, in words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from reasonrec.data_gen.reasoning.traces import CUES, STAGES, Trace, pieces
from reasonrec.data_gen.tasks.prompts import Example, Prompts
from reasonrec.data_gen.tasks.render import (
    Block,
    Examples,
    Material,
    Task,
    Window,
    register,
    rounds,
    text_bytes,
)
from reasonrec.tokenizers.errors import UserError

Mention = Literal["codes", "titles", "both"]

_NEEDS: dict[str, tuple[str, ...]] = {
    **{stage: (stage,) for stage in STAGES},
    "formulation": ("intent", "formulation"),
    "rewriting": ("intent", "rewriting"),
    "reason": (),
    "itemsearch": ("intent", "preference"),
    "preferenceobtain": ("preference",),
}
QUESTIONS: dict[str, tuple[str, ...]] = {
    "evidence": ("History:{history}\nWhat these choices show:", "What stands out in{history}?\nThis:"),
    "preference": ("History:{history}\nShown by it:{evidence}\nLasting taste:",),
    "intent": ("History:{history}\nWanted now:", "What is someone after who chose{history}?\nAfter:"),
    "formulation": ("History:{history}\nWanted now:{intent}\nKind of item to suggest:",),
    "rewriting": ("History:{history}\nWanted now:{intent}\nThe choices that fit:",),
    "itemsearch": (
        "Someone wants:{intent}\nItem:",
        "Find an item. Wanted now:{intent}; liked in general:{preference}. Item:",
        "History:{history}\nWanted now:{intent}\nItem:",
        "History:{history}\nLiked in general:{preference}; wanted now:{intent}\nItem:",
    ),
    "preferenceobtain": (
        "History:{history}\nThis person likes:",
        "Describe the taste behind{history}.\nTaste:",
        "Someone chose, oldest first:{history}\nIn general they go for:",
    ),
}
_NO_EVIDENCE = ("History:{history}\nLasting taste:",)


class TraceChains:
    """Traces as token ids.

    Args:
        prompts: Knows the items' tokens and how histories are read.
        titles: Title of each item.
        traces: The traces, in the order by which plan lines name them.
        mention: How chains refer to items.
        max_text_tokens: Cut for titles, in tokens.
    """

    def __init__(
        self,
        prompts: Prompts,
        titles: Sequence[str],
        traces: Sequence[Trace],
        mention: Mention = "codes",
        max_text_tokens: int = 48,
    ) -> None:
        self.prompts = prompts
        self.titles = titles
        self.traces = traces
        self.mention = mention
        self.max_text_tokens = max_text_tokens

    def eligible(self, task: str) -> np.ndarray:
        """Numbers of the traces that a task can be made of.

        Raises:
            UserError: If there are none.
        """
        needed = _NEEDS[task]
        found = [i for i, trace in enumerate(self.traces) if all(getattr(trace, stage) for stage in needed)]
        if not found:
            raise UserError(f"no trace has what the task {task} needs ({', '.join(needed) or 'anything'})")
        return np.array(found, dtype=np.int64)

    def lengths(self, task: str) -> np.ndarray:
        """About how many tokens an example of each trace has, to put similar ones together: (traces,)."""
        item = float(np.mean([len(ids) for ids in self.prompts.item_token_ids]))
        history = np.array([len(trace.history) for trace in self.traces]) * item
        chain = np.array([sum(len(text) for text in trace.stages.values()) / 5 for trace in self.traces])
        return (history + chain * (task == "reason" or task in STAGES) + 10).astype(np.int64)

    def ids(self, trace: Trace) -> list[int]:
        """Token ids of a chain, delimiters included."""
        sentences = [token for stage in trace.stages for token in self.sentence(trace, stage)]
        return [*self.prompts.think_ids, *sentences, *self.prompts.close_ids]

    def sentence(self, trace: Trace, stage: str) -> list[int]:
        """Token ids of a stage's sentence in the chain."""
        syntax = self.prompts.prompter.syntax
        return [*syntax(f" {CUES[stage]}:"), *self.body(trace.stages[stage]), *syntax(".")]

    def body(self, text: str) -> list[int]:
        """Token ids of a stage's words and items, beginning with a space where it begins with a word."""
        prompter = self.prompts.prompter
        ids: list[int] = []
        before: str | int = ""
        for piece in pieces(text):
            behind, before = before, piece
            if isinstance(piece, int):
                if self.mention != "codes":
                    ids += prompter.syntax(",") if isinstance(behind, int) else ()
                    ids += self.prompts.words(self.titles[piece], self.max_text_tokens)
                if self.mention != "titles":
                    ids += self.prompts.item_token_ids[piece]
                continue
            words = piece.strip()
            if words:  # a comma clings to what stands before it
                ids += prompter.data(words if words[0] in ",;.:)" else f" {words}")
        return ids


class _OfTraces(Task):
    """An example for each trace that has what it needs."""

    traces = True

    def draw(self, material: Material, window: Window, count: int | None, rng: np.random.Generator) -> Block:
        """Rounds over the traces.

        Raises:
            UserError: If there are none.
        """
        if material.chains is None:
            raise UserError(f"the task {self.name} is made of reasoning traces: set traces to a folder of them")
        return rounds(material.chains.eligible(self.name), material.chains.lengths(self.name), count, rng)

    def most_tokens(self, examples: Examples, source: int, items: int) -> int:
        """Tokens of a history and of all stages, each in the chain or in a question."""
        trace, item, text = examples.chains.traces[source], examples.longest_item, examples.max_text_tokens
        bound = len(trace.history) * item + item
        for stage in trace.stages.values():
            for piece in pieces(stage):
                bound += text + item + 4 if isinstance(piece, int) else text_bytes(piece) + 2
            bound += 32  # the cue, and what joins sentences
        return bound

    def question(self, examples: Examples, trace: Trace, phrasing: int) -> list[int]:
        """The task as a question of its own."""
        prompts, body = examples.prompts, examples.chains.body
        values: dict[str, str | list[int]] = {"history": prompts.item_ids(trace.history)}
        values |= {stage: body(text) for stage, text in trace.stages.items()}
        questions = [q for q in QUESTIONS[self.name] if "{evidence}" not in q or trace.evidence] or _NO_EVIDENCE
        return prompts.prompter(questions[phrasing % len(questions)], values)

    def answer(self, examples: Examples, trace: Trace, stage: str, variant: int) -> Example:
        """A question that is answered by a stage's words."""
        words = examples.chains.body(trace.stages[stage])
        return examples.in_words(self.question(examples, trace, variant), words)


class Stage(_OfTraces):
    """One stage: at even variants as its sentence in the chain, at odd ones as the answer to a question.

    Args:
        name: The stage.
    """

    def __init__(self, name: str) -> None:
        self.name, self.templates = name, QUESTIONS[name]

    def render(self, examples: Examples, source: int, part: slice, shuffle: int, variant: int) -> Example:
        """A sentence, or an answer."""
        trace = examples.chains.traces[source]
        if variant % 2:
            return self.answer(examples, trace, self.name, variant // 2)
        chains, prompts = examples.chains, examples.prompts
        before = [stage for stage in STAGES[: STAGES.index(self.name)] if stage in trace.stages]
        prompt = prompts.reasoning(trace.history)
        prompt += [token for stage in before for token in chains.sentence(trace, stage)]
        answer = chains.sentence(trace, self.name)
        if self.name == list(trace.stages)[-1]:
            answer += prompts.answer_opening_ids
        return examples.answered(prompt, answer)


class Reason(_OfTraces):
    """The whole chain and its item."""

    name = "reason"

    def render(self, examples: Examples, source: int, part: slice, shuffle: int, variant: int) -> Example:
        """The opening delimiter is part of the prompt; all behind it is learnt."""
        trace, prompts = examples.chains.traces[source], examples.prompts
        prompt = prompts.reasoning(trace.history)
        chain = examples.chains.ids(trace)[len(prompts.think_ids) :]
        # The marker is learnt: writing it is how the policy ends its chain.
        return examples.answered(prompt, [*chain, prompts.begin_id, *prompts.answer(trace.target)])


class ItemSearch(_OfTraces):
    """What someone wants to the item."""

    name, templates = "itemsearch", QUESTIONS["itemsearch"]

    def render(self, examples: Examples, source: int, part: slice, shuffle: int, variant: int) -> Example:
        """A question, and codes as the answer."""
        trace = examples.chains.traces[source]
        return examples.item_answer(self.question(examples, trace, variant), trace.target)


class PreferenceObtain(_OfTraces):
    """The history to the lasting taste."""

    name, templates = "preferenceobtain", QUESTIONS["preferenceobtain"]

    def render(self, examples: Examples, source: int, part: slice, shuffle: int, variant: int) -> Example:
        """A question, and words as the answer."""
        trace = examples.chains.traces[source]
        return self.answer(examples, trace, "preference", variant)


register(*map(Stage, STAGES), Reason(), ItemSearch(), PreferenceObtain())
