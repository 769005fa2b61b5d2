"""A teacher that runs here: any causal LM of transformers with a chat template."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Generic

from reasonrec.data_gen.reasoning.teachers.prompts import Asks, QuestionT
from reasonrec.data_gen.reasoning.teachers.reply_log import ReplyLog, request_hash
from reasonrec.data_gen.reasoning.traces import Reply
from reasonrec.tokenizers.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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

    def __post_init__(self) -> None:
        if not self.tokenizer.chat_template:
            raise UserError(f"teacher_model={self.name} has no chat template: choose an instruction-tuned model")

    def write(self, cases: Iterable[QuestionT]) -> Iterator[Reply]:
        """Write a reply for each case; those in the log are not generated again."""
        todo = iter(cases)
        while group := list(islice(todo, self.batch_size)):
            asked = []
            for case in group:
                request = {"messages": self.asker.messages(case), "model": self.name, "tokens": self.max_new_tokens}
                asked.append((case, request["messages"], request_hash(request)))
            new = [(case, messages, key) for case, messages, key in asked if self.log.get(key) is None]
            texts = self._generate([messages for _, messages, _ in new]) if new else []
            for (case, _, key), text in zip(new, texts, strict=True):
                problem = None if text.strip() else "empty"
                self.log.add({"request": key, "case": case.key, "text": text, "problem": problem})
            for case, _, key in asked:
                entry = self.log.get(key) or {}
                yield Reply(case.key, entry["text"], entry["problem"])

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
