"""The policy: histories in titles, an answer at the end of the sequence, item prompts, and the table kept fresh."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from reasonrec.data_gen.tasks.prompts import Example, Items, Prompter, Prompts, check_prompt
from reasonrec.recipes.decoding.sample import Rollouts
from reasonrec.recipes.models.checkpoint import Setting
from reasonrec.recipes.policies.base import POLICIES, Parse, Policy
from reasonrec.recipes.policies.dual_head.answers import ITEM_BASE, ItemAnswers, Similarity
from reasonrec.rewards.parse import Flags, Parsed
from reasonrec.tokenizers.artefact import file_hash
from reasonrec.tokenizers.catalogue import Catalogue
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.manifest import Manifest
from reasonrec.tokenizers.registry import check_options
from reasonrec.tokenizers.terminal import say, shown
from reasonrec.tokenizers.whole import whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TABLE_FILE = "policy.safetensors"
WEIGHTS = ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")
_SEPARATOR = ";"


@dataclass(frozen=True)
class DualHeadOptions:
    """The policy's own options.

    Attributes:
        temperature: τ that similarities are divided by; R2ec's code has 0.02 for the cosine.
        similarity: `cosine` or `dot`.
        centre: Take the catalogue's mean vector away before vectors are compared.
        popularity_prior: Add the log of an item's train count to its score.
        over: What the supervised loss normalises over: `catalogue`, or `batch` for large ones.
        fresh_items: Targets of a batch that are read with gradient, at most.
        refresh_steps: Read the whole catalogue again every so many steps.
        item_prompt: Template that items are read with; its place is {item}.
        item_tokens: Cut for an item's text in it, in tokens.
        title_tokens: Cut for titles in histories and chains.
    """

    temperature: float = 0.02
    similarity: Similarity = "cosine"
    centre: bool = False
    popularity_prior: bool = False
    over: Literal["catalogue", "batch"] = "catalogue"
    fresh_items: int = 64
    refresh_steps: int = 100
    item_prompt: str = "Item:{item}"
    item_tokens: int = 48
    title_tokens: int = 24

    def __post_init__(self) -> None:
        for name in ("fresh_items", "refresh_steps", "item_tokens", "title_tokens"):
            whole(name, getattr(self, name), at_least=1)
        number = self.temperature
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < float("inf"):
            raise UserError(f"temperature={shown(number)} has to be a finite number above 0")
        for name, known in (("similarity", get_args(Similarity)), ("over", ("catalogue", "batch"))):
            if getattr(self, name) not in known:
                raise UserError(f"{name}={shown(getattr(self, name))}: choose {' or '.join(known)}")
        check_prompt("item_prompt", self.item_prompt, "item")

    @classmethod
    def read(cls, options: dict[str, Any]) -> DualHeadOptions:
        """The options of a configuration.

        Raises:
            UserError: If there is no such option, or a value is wrong.
        """
        check_options("the policy dual_head", options, [item.name for item in fields(cls)])
        return cls(**options)


@dataclass(frozen=True)
class TextPrompts(Prompts):
    """Items are read as their titles, and answered by their number."""

    def answer(self, item: int) -> list[int]:
        """The number, which no model reads."""
        return [ITEM_BASE + int(item)]

    def sequence(self, history: Items, target: int) -> Example:
        """A history whose every item is followed by what a prompt ends with, and by the next item as the answer.

        These branches see what stands before them and are seen by nothing, so each is the prompt of inference.
        """
        head, tail = self.direct_parts()
        ids, labels = list(head), [-100] * len(head)
        for item, following in zip(history, [*history[1:], target], strict=True):
            read = [*self.item_token_ids[item], *tail]
            ids += [*read, *self.answer(following)]
            labels += [-100] * len(read) + self.answer(following)
        return ids, labels


class DualHead(Policy):
    """The LLM reads items as text, and ranks them by vectors it reads itself; no new vocabulary, no item index."""

    name = "dual_head"
    answers: ItemAnswers

    def __init__(
        self,
        catalogue: Catalogue,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Prompts,
        answers: ItemAnswers,
        options: DualHeadOptions,
    ) -> None:
        super().__init__(catalogue, tokenizer, prompts, answers)
        self.options = options

    @classmethod
    def build(cls, catalogue: Catalogue, setting: Setting, tokenizer: PreTrainedTokenizerBase) -> DualHead:
        """See `Policy`.

        Raises:
            UserError: If an option is wrong, or an item has no text to be read from.
        """
        options = DualHeadOptions.read(setting.policy_options)
        texts = catalogue.texts("title", "category", "brand", "description")
        empty = [item for item, text in enumerate(texts) if not text.strip()]
        if empty:
            raise UserError(
                f"{len(empty)} items have no text, such as {shown(catalogue.item_ids[empty[0]])}: the policy "
                f"{cls.name} reads items from theirs; give them titles, prepare with drop_items_without_text=true, or "
                "choose policy=semantic_id"
            )
        prompter = Prompter(tokenizer, chat=setting.chat, system=setting.system)
        reader = Prompter(tokenizer)  # items are read without manners
        end = int(tokenizer.eos_token_id)
        names = [title or text for title, text in zip(catalogue.titles, texts, strict=True)]
        separator = list(prompter.syntax(_SEPARATOR))
        mentions = [[*prompter.data(f" {name}")[: options.title_tokens], *separator] for name in names]
        prompts = TextPrompts(prompter, setting.history_prompt, mentions, end, end)
        cut = [prompter.data(f" {text}")[: options.item_tokens] for text in texts]
        answers = ItemAnswers(
            [[*reader(options.item_prompt, {"item": ids}), end] for ids in cut],
            end,
            len(prompts.direct_parts()[1]),
            catalogue.items["train_count"].to_numpy(),
            temperature=options.temperature,
            similarity=options.similarity,
            centre=options.centre,
            popularity_prior=options.popularity_prior,
            over=options.over,
            fresh_items=options.fresh_items,
        )
        return cls(catalogue, tokenizer, prompts, answers, options)

    # -- the table

    def refresh(self, model: PreTrainedModel, step: int | None = None) -> None:
        """Read the whole catalogue, in a training every `refresh_steps`."""
        if step is not None and step % self.options.refresh_steps:
            return
        training = model.training
        model.eval()
        self.answers.read_all(model)
        model.train(training)

    def save(self, folder: Path, *, current: bool = True) -> dict[str, Any]:
        """Write the table beside the weights, with their hash, if it is theirs."""
        facts = super().save(folder, current=current)
        if current and self.answers.table is not None:
            table = {"items": self.answers.table.cpu().contiguous()}
            if self.answers.mean is not None:
                table["mean"] = self.answers.mean.cpu().contiguous()
            save_file(table, folder / TABLE_FILE, metadata={"weights": _weights(folder)})
        return facts

    def load(self, folder: Path, manifest: Manifest, model: PreTrainedModel) -> None:
        """Read the table, or make it anew where there is none of these weights."""
        answers, file, found = self.answers, folder / TABLE_FILE, dict[str, Tensor]()
        if file.is_file():
            from safetensors import safe_open

            with safe_open(file, framework="pt") as opened:
                written = (opened.metadata() or {}).get("weights")
            if written == _weights(folder):
                found = load_file(file)
            else:
                say(f"{file} is of other weights than those beside it: the items are read anew")
        width = model.config.get_text_config().hidden_size
        shapes = {"items": (answers.n_items, width)} | ({"mean": (width,)} if answers.centre else {})
        sound = {name: tuple(value.shape) for name, value in found.items() if bool(torch.isfinite(value).all())}
        if sound != shapes:
            say(f"reading {answers.n_items:,} items …")
            self.refresh(model)
            return
        answers.table = found["items"].float()
        answers.mean = found["mean"].float() if answers.centre else None

    def measured(self) -> dict[str, float]:
        """Tokens of item prompts that were read: no batch of the trainer holds them."""
        return {"item_tokens_read": float(self.answers.tokens_read)}

    def card(self) -> dict[str, str]:
        """What items are to the model."""
        return {"items": f"vectors the model reads from their text ({self.options.similarity})"}

    # -- reinforcement learning

    def parser(self, *, reasoning: bool) -> Parse:
        """Chains end at the marker; behind it stands an item, always."""
        close, begin = list(self.prompts.close_ids), self.answers.begin_id

        def parse(completion_ids: Sequence[Sequence[int]], cut: Sequence[bool] | None = None) -> Parsed:
            chains: list[list[int]] = []
            flags, items = [], []
            for row, ids in enumerate(completion_ids):
                chain = list(ids[: ids.index(begin)]) if reasoning else []
                closed = bool(close) and chain[-len(close) :] == close
                chains.append(chain[: -len(close)] if closed else chain)
                unfinished = reasoning and (not closed or bool(cut is not None and cut[row]))
                items.append(next(token for token in ids if token >= ITEM_BASE) - ITEM_BASE)
                flags.append(Flags(bool(chains[-1]), unfinished, False, False, False, False))
            return Parsed(None, items, chains, flags)

        return parse

    def optimised(self, rollouts: Rollouts, target: np.ndarray, group_targets: np.ndarray) -> Rollouts:
        """The item action is the target, whatever was ranked first; its rivals are the targets of all groups."""
        self.answers.candidates = torch.from_numpy(np.unique(group_targets)).to(self.answers.order.device)
        completions = [
            [ITEM_BASE + int(item) if token >= ITEM_BASE else token for token in ids]
            for ids, item in zip(rollouts.completion_ids, target, strict=True)
        ]
        return replace(rollouts, completion_ids=completions)

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Completions as text, without what is no token."""
        return super().decode([[token for token in row if token < ITEM_BASE] for row in ids])


def _weights(folder: Path) -> str:
    """Hash of the weights in a folder."""
    return next(file_hash(folder / name) for name in WEIGHTS if (folder / name).is_file())


POLICIES.add(DualHead.name, DualHead, __name__)
