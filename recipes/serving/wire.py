"""What travels over HTTP: requests, whose limits do not depend on the server, and answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

# Far above what makes sense, so that no request is larger than what the server's own limits can judge.
MAX_ITEMS = 10_000
MAX_USERS = 1_024
ItemId = Annotated[str, StringConstraints(max_length=512)]
History = Annotated[list[ItemId], Field(max_length=MAX_ITEMS)]


class Given(BaseModel):
    """A request: keys that nobody reads are refused, and numbers are no text."""

    model_config = ConfigDict(extra="forbid", strict=True)


class RecommendRequest(Given):
    """Whom to recommend what."""

    history: History | Annotated[list[History], Field(max_length=MAX_USERS)] = Field(
        description="raw item ids, oldest first: of one user, or a list for each of several",
        examples=[["50", "181", "172"]],
    )
    k: int = Field(default=10, ge=1, description="items to recommend")
    mode: Literal["direct", "reasoning"] = Field(default="direct", description="items at once, or behind a chain")
    mask: bool | None = Field(
        default=None, description="never recommend what the user had; as the data set says if it is left out"
    )
    exclude: History = Field(default_factory=list, description="raw ids of further items that must not appear")
    explain: bool = Field(default=False, description="return the chain of thought")
    strict: bool = Field(default=False, description="refuse unknown item ids instead of counting them")
    stream: bool = Field(
        default=False, description="server-sent events: the chain while it is written, then the items"
    )


class FoundItem(BaseModel):
    """An item of the catalogue."""

    id: str
    title: str
    codes: list[int] | None = Field(default=None, description="its semantic ID, if the model has such")


class Item(FoundItem):
    """A recommended item."""

    score: float = Field(description="log-probability")


class UserResult(BaseModel):
    """What one user is recommended."""

    items: list[Item]
    thoughts: list[str] | None = Field(default=None, description="chains of thought, where they were asked for")
    note: str = Field(default="", description="why the model did not think although it was asked to")
    unknown: int = Field(default=0, description="items of the history that are not in the catalogue")
    milliseconds: float


class RecommendResponse(BaseModel):
    """A result for each user."""

    model: str
    mode: str
    results: list[UserResult]


class SearchResponse(BaseModel):
    """Items whose title or id holds the words."""

    items: list[FoundItem]


class Model(BaseModel):
    """What is served."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "reasonrec"
    items: int
    modes: list[str]
    reasoning_note: str = Field(description="what was measured of thinking, or why it is not offered")
    experts: list[str]
    mask_history: bool
    max_history: int = Field(description="items of a history that the model reads")


class Models(BaseModel):
    """OpenAI's list of models."""

    object: Literal["list"] = "list"
    data: list[Model]


class Message(Given):
    """A message of a chat."""

    role: str = Field(max_length=64)
    content: str = Field(max_length=1_000_000)


class ChatRequest(Given):
    """OpenAI's chat completion, as servers of generative recommenders use it.

    The last message holds a history: raw item ids, joined by commas. Each of the `n` choices is an item.
    """

    model_config = ConfigDict(extra="ignore", strict=True)  # clients of that interface send more than is read here

    messages: Annotated[list[Message], Field(min_length=1, max_length=64)]
    model: str = Field(default="", max_length=512)
    n: int = Field(default=10, ge=1)
    stream: Literal[False] = False


class Choice(BaseModel):
    """An item as OpenAI's choice: `message.content` is its raw id, `logprobs` its score."""

    index: int
    message: dict[str, str]
    finish_reason: Literal["stop"] = "stop"
    logprobs: dict[str, Any]
    title: str


class ChatResponse(BaseModel):
    """OpenAI's answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: dict[str, int]

    @classmethod
    def of(cls, items: Sequence[Item], answer_id: str, model: str, history: int) -> ChatResponse:
        """The answer that holds some items.

        Args:
            items: Best first.
            answer_id: Its id.
            model: Who recommends them.
            history: Items of the history, which count as the prompt.
        """
        choices = [
            Choice(
                index=index,
                message={"role": "assistant", "content": item.id},
                logprobs={"content": [{"token": item.id, "logprob": item.score, "top_logprobs": []}]},
                title=item.title,
            )
            for index, item in enumerate(items)
        ]
        usage = {"prompt_tokens": history, "completion_tokens": len(items), "total_tokens": history + len(items)}
        return cls(id=answer_id, created=int(time.time()), model=model, choices=choices, usage=usage)


class Problem(BaseModel):
    """What is wrong with a request."""

    detail: Any
