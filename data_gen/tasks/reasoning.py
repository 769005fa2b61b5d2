"""Reasoning traces as supervised examples.

The chain stands between the history and the begin marker, inside think delimiters, as one short sentence a stage:

    History:⟨items⟩<think> Evidence: War⟨item⟩. Taste: War. Wants: Comedy. Next: … Keep: …</think>⟨begin⟩⟨item⟩

Tasks:
    reason: the whole of it, with the loss on the chain and on the answer.
    evidence, preference, intent, formulation, rewriting: one stage each; half of them as its sentence in the chain,
        after those before it, the other half as the answer to a question of its own.
    itemsearch: what someone wants, in words (and the history), to the item.
    preferenceobtain: the history to the lasting taste, in words.

The delimiters are ordinary text; a tokenizer that has them as tokens of their own uses those.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from reasonrec.data_gen.reasoning.traces import CUES, STAGES, Trace, pieces
from reasonrec.tokenizers.errors import UserError

if TYPE_CHECKING:
    from reasonrec.data_gen.tasks.render import Renderer

REASONING_TASKS = (*STAGES, "reason", "itemsearch", "preferenceobtain")
THINK, THOUGHT = "<think>", "</think>"
Mention = Literal["codes", "titles", "both"]
Example = tuple[list[int], list[int]]

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


class ReasoningRenderer:
    """Renders traces; hangs on the renderer of the other tasks.

    Args:
        renderer: Knows the items' tokens and the prompts.
        traces: The traces, in the order by which plan lines name them.
        mention: How chains refer to items.
    """

    def __init__(self, renderer: Renderer, traces: Sequence[Trace], mention: Mention = "codes") -> None:
        self.renderer = renderer
        self.traces = traces
        self.mention = mention

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
        item = float(np.mean([len(ids) for ids in self.renderer.item_token_ids]))
        history = np.array([len(trace.history) for trace in self.traces]) * item
        chain = np.array([sum(len(text) for text in trace.stages.values()) / 5 for trace in self.traces])
        return (history + chain * (task == "reason" or task in STAGES) + 10).astype(np.int64)

    def render(self, task: str, number: int, variant: int) -> Example:
        """Token ids and labels of one example.

        Args:
            task: One of `REASONING_TASKS`.
            number: Number of the trace.
            variant: Chooses among phrasings.
        """
        trace, renderer = self.traces[number], self.renderer
        if task == "reason":
            return self._reason(trace)
        if task in STAGES and variant % 2 == 0:
            return self._sentence(trace, task)
        values: dict[str, str | list[int]] = {"history": renderer.item_ids(trace.history)}
        values |= {stage: self._body(text) for stage, text in trace.stages.items()}
        questions = [q for q in QUESTIONS[task] if "{evidence}" not in q or trace.evidence]
        questions = questions or ["History:{history}\nLasting taste:"]
        phrasing = variant // 2 if task in STAGES else variant  # even variants of stages went to the chain
        prompt = renderer.prompter(questions[phrasing % len(questions)], values)
        if task == "itemsearch":
            return renderer._item_answer(prompt, trace.target)
        text = trace.stages["preference" if task == "preferenceobtain" else task]
        answer = [*self._body(text), renderer.eos_id]
        return prompt + answer, [-100] * len(prompt) + answer

    def chain_ids(self, trace: Trace) -> list[int]:
        """Token ids of a chain, delimiters included."""
        opening = think_ids(self.renderer)
        sentences = [token for stage in trace.stages for token in self._stage(trace, stage)]
        return [*opening, *sentences, *close_ids(self.renderer)]

    def _reason(self, trace: Trace) -> Example:
        prompt = reason_prompt_ids(self.renderer, trace.history)
        opening = think_ids(self.renderer)
        chain = self.chain_ids(trace)[len(opening) :]
        answer = self.renderer.item_token_ids[trace.target]
        marker = [self.renderer.begin_id]
        # The opening is part of the prompt. The marker is learnt: writing it is how the policy ends its chain.
        labels = [*[-100] * len(prompt), *chain, *marker, *answer]
        return [*prompt, *chain, *marker, *answer], labels

    def _sentence(self, trace: Trace, stage: str) -> Example:
        before = [s for s in STAGES[: STAGES.index(stage)] if s in trace.stages]
        prompt = reason_prompt_ids(self.renderer, trace.history)
        prompt += [token for s in before for token in self._stage(trace, s)]
        answer = self._stage(trace, stage)
        if stage == list(trace.stages)[-1]:
            answer += answer_opening_ids(self.renderer)
        return prompt + answer, [-100] * len(prompt) + answer

    def _stage(self, trace: Trace, stage: str) -> list[int]:
        syntax = self.renderer.prompter._syntax_cached
        return [*syntax(f" {CUES[stage]}:"), *self._body(trace.stages[stage]), *syntax(".")]

    def _body(self, text: str) -> list[int]:
        """Token ids of a stage's words and items, beginning with a space where it begins with a word."""
        renderer = self.renderer
        ids: list[int] = []
        before: str | int = ""
        for piece in pieces(text):
            behind, before = before, piece
            if isinstance(piece, int):
                if self.mention != "codes":
                    ids += renderer.prompter._syntax_cached(",") if isinstance(behind, int) else ()
                    ids += renderer._cut(renderer.titles[piece])
                if self.mention != "titles":
                    ids += renderer.item_token_ids[piece]
                continue
            words = piece.strip()
            if words:  # a comma clings to what stands before it
                ids += renderer.prompter.data(words if words[0] in ",;.:)" else f" {words}")
        return ids


def think_ids(renderer: Renderer) -> list[int]:
    """Token ids of the opening delimiter."""
    return list(renderer.prompter._syntax_cached(THINK))


def reason_prompt_ids(renderer: Renderer, history: Sequence[int] | np.ndarray) -> list[int]:
    """Prompt of the reasoning mode: the history, and the opening delimiter in place of the begin marker."""
    prompt = renderer.prompter(renderer.history_prompt, {"history": renderer.item_ids(history)})
    return [*prompt, *think_ids(renderer)]


def answer_opening_ids(renderer: Renderer) -> list[int]:
    """What ends a chain and opens its answer: the closing delimiter and the begin marker."""
    return [*close_ids(renderer), renderer.begin_id]


def close_ids(renderer: Renderer) -> tuple[int, ...]:
    """Token ids of the closing delimiter."""
    return tuple(renderer.prompter._syntax_cached(THOUGHT))
