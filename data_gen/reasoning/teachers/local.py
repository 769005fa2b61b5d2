"""A teacher that runs here: any causal LM of transformers with a chat template."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Generic, NamedTuple

from reasonrec.data_gen.reasoning.teachers.prompts import Asks, QuestionT
from reasonrec.data_gen.reasoning.teachers.reply_log import ReplyLog, request_hash
from reasonrec.data_gen.reasoning.traces import Reply
from reasonrec.tokenizers.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Asked(NamedTuple):
    """A question of a batch.

    Attributes:
        case: What it is about.
        messages: How it is put.
        request: Its hash.
        new: Whether it is to be generated: it is neither in the log nor in a batch before.
    """

    case: str
    messages: Any
    request: str
    new: bool


Batch = list[Asked]
Each = Callable[[Callable[[Batch], list[str]], Iterable[Batch]], Iterator[tuple[Batch, list[str]]]]


def one_by_one(read: Callable[[Batch], list[str]], batches: Iterable[Batch]) -> Iterator[tuple[Batch, list[str]]]:
    """Each batch and what was written for it, by this process alone."""
    for batch in batches:
        yield batch, read(batch)


@dataclass
class LocalTeacher(Generic[QuestionT]):
    """Generates replies greedily, so the same model says the same thing every time.

    Args:
        asker: Makes the messages.
        model: The LLM.
        tokenizer: Its tokenizer.
        name: Name in reports and in the log.
        log: Where replies are kept.
        hindsight: Whether the messages show what was chosen.
        batch_size: Cases generated together.
        max_new_tokens: Longest reply.
        each: Goes through batches; several processes may share them out, if all come by all replies in order.

    Raises:
        UserError: If the tokenizer has no chat template.
    """

    asker: Asks[QuestionT]
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    log: ReplyLog
    hindsight: bool = False
    batch_size: int = 8
    max_new_tokens: int = 300
    each: Each = one_by_one

    def __post_init__(self) -> None:
        if not self.tokenizer.chat_template:
            raise UserError(f"teacher_model={self.name} has no chat template: choose an instruction-tuned model")

    def write(self, cases: Iterable[QuestionT]) -> Iterator[Reply]:
        """Write a reply for each case; those in the log are not generated again."""
        for batch, texts in self.each(self._texts, self._batches(cases)):
            for asked, text in zip([asked for asked in batch if asked.new], texts, strict=True):
                problem = None if text.strip() else "empty"
                self.log.add({"request": asked.request, "case": asked.case, "text": text, "problem": problem})
            for asked in batch:
                entry = self.log.get(asked.request) or {}
                yield Reply(asked.case, entry["text"], entry["problem"])

    def _batches(self, cases: Iterable[QuestionT]) -> Iterator[Batch]:
        todo, before = iter(cases), set[str]()
        while group := list(islice(todo, self.batch_size)):
            batch = []
            for case in group:
                request = {"messages": self.asker.messages(case), "model": self.name, "tokens": self.max_new_tokens}
                key = request_hash(request)
                new = key not in before and self.log.get(key) is None
                batch.append(Asked(case.key, request["messages"], key, new))
            before.update(asked.request for asked in batch)
            yield batch

    def _texts(self, batch: Batch) -> list[str]:
        new = [asked.messages for asked in batch if asked.new]
        return self._generate(new) if new else []

    def _generate(self, conversations: list[Any]) -> list[str]:
        import torch

        render = self.tokenizer.apply_chat_template
        prompts = [render(c, tokenize=False, add_generation_prompt=True) for c in conversations]
        inputs = self.tokenizer(
            prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
        ).to(self.model.device)
        with torch.no_grad():
            out = self.model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                max_new_tokens=self.max_new_tokens,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        new = out[:, inputs["input_ids"].shape[1] :]
        return list(self.tokenizer.batch_decode(new, skip_special_tokens=True))
