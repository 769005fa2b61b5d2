"""Policies: how a model reads histories and writes answers, in training, rollouts, evaluation and serving alike.

A policy is what a method brings: its prompts, and its answers (`decoding.answers.Answers`: how they are scored, drawn
and ranked). Trainers, rewards, rankers and serving do not know which one they have. It stands in a file of its own in
this folder and registers itself under a name, by which `recipes/sft.py` is told; checkpoints remember it.
"""

from __future__ import annotations

import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from reasonrec.data_gen.sequences import Sequences
from reasonrec.data_gen.tasks.prompts import Prompts
from reasonrec.data_gen.tasks.reasoning import Mention, TraceChains
from reasonrec.data_gen.tasks.render import Examples
from reasonrec.recipes.decoding.answers import Answers, Scored
from reasonrec.recipes.models.checkpoint import Setting
from reasonrec.recipes.models.load import load_tokenizer
from reasonrec.rewards.calling import CODES
from reasonrec.rewards.parse import Parsed
from reasonrec.rewards.registry import WeightedRewards
from reasonrec.tokenizers.catalogue import Catalogue
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.index import ItemIndex
from reasonrec.tokenizers.manifest import Manifest
from reasonrec.tokenizers.registry import Registry
from reasonrec.tokenizers.rows import text_logits

if TYPE_CHECKING:
    import polars as pl
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from reasonrec.data_gen.reasoning.traces import Trace
    from reasonrec.recipes.decoding.sample import Rollouts

TEXT_CHUNK = 1024  # text positions whose full-vocabulary logits exist at a time
TEACHER_ROWS = "teacher_rows"  # of a batch: the position of a teacher's table that each label stands at, -1 for none
MODULES = ("semantic_id", "dual_head", "parallel_codes")
Parse = Callable[..., Parsed]
SoftScore = Callable[[Any, Tensor, Tensor, Tensor, Tensor, Tensor], Scored]  # see `policies.soft`


class Policy(ABC):
    """One way to turn an LLM into a recommender.

    Attributes:
        name: Its name in configurations and checkpoints.
        with_codes: Whether its items are codes, so that it needs an item index.
        gives: What its rollouts tell rewards, of the keywords in `rewards.calling.OF_POLICY` that are no codes.
        with_tree: Whether its answers are paths in one tree of codes, in which soft targets are shared out.
        catalogue: The items.
        tokenizer: The LLM's tokenizer, with the policy's own tokens if it has some.
        prompts: How histories are read.
        answers: How answers are scored, drawn and ranked.
    """

    name: ClassVar[str]
    with_codes: ClassVar[bool] = False
    gives: ClassVar[tuple[str, ...]] = ()
    with_tree: ClassVar[bool] = False
    answers: Answers

    def __init__(
        self, catalogue: Catalogue, tokenizer: PreTrainedTokenizerBase, prompts: Prompts, answers: Answers
    ) -> None:
        self.catalogue, self.tokenizer, self.prompts, self.answers = catalogue, tokenizer, prompts, answers

    @property
    def eos_id(self) -> int:
        """What ends a sequence."""
        return int(self.tokenizer.eos_token_id)

    @property
    def pad_id(self) -> int:
        """What batches are padded with."""
        return int(self.tokenizer.pad_token_id)

    @classmethod
    @abstractmethod
    def build(cls, catalogue: Catalogue, setting: Setting, tokenizer: PreTrainedTokenizerBase) -> Policy:
        """Glue catalogue and tokenizer together.

        Raises:
            UserError: If the catalogue lacks what the policy needs, or an option is wrong.
        """

    # -- the model

    @property
    def new_tokens(self) -> list[int]:
        """Tokens that the base model does not have, whose rows are trained."""
        return []

    def start(self, model: PreTrainedModel) -> None:  # noqa: B027 - a hook
        """Make a fresh base model ready for training."""

    def resize(self, model: PreTrainedModel) -> None:  # noqa: B027 - a hook
        """Make a fresh base model ready for a trained adapter."""

    def refresh(self, model: PreTrainedModel, step: int | None = None) -> None:  # noqa: B027 - a hook
        """Compute anew what depends on the weights.

        Args:
            model: Causal LM below PEFT's wrapper.
            step: Step of a training, in which only what is due is computed; None for everything.
        """

    def save(self, folder: Path, *, current: bool = True) -> dict[str, Any]:
        """Write what recommending needs beside the weights, which are there already.

        Args:
            folder: Where to.
            current: The weights are those of the model that was refreshed last.

        Returns:
            Facts for the manifest.
        """
        self.tokenizer.save_pretrained(folder)
        return self.catalogue.save(folder)

    def load(self, folder: Path, manifest: Manifest, model: PreTrainedModel) -> None:  # noqa: B027 - a hook
        """Read what `save` wrote and `build` does not make anew.

        Args:
            folder: Folder of the checkpoint.
            manifest: Its manifest.
            model: Causal LM that was loaded from it, below PEFT's wrapper.
        """

    def measured(self) -> dict[str, float]:
        """What a training metered beside the trainer's own numbers, such as tokens that no batch holds."""
        return {}

    def card(self) -> dict[str, str]:
        """Lines for a model's card: what the items are to the model."""
        return {}

    # -- training

    def examples(
        self,
        train: pl.DataFrame | Sequences,
        *,
        one_per_prefix: bool,
        traces: Sequence[Trace] = (),
        mention: Mention = "codes",
        set_order: bool = False,
    ) -> Examples:
        """What renders training examples.

        Args:
            train: The dataset's training sequences, as a table or as `Dataset.sequences`.
            one_per_prefix: Put the loss on answers alone.
            traces: Reasoning traces, for the tasks that are made of them.
            mention: How their chains name items.
            set_order: The sequences are sets (baskets).
        """
        titles = self.catalogue.titles
        return Examples(
            self.prompts,
            Sequences.of(train),
            titles,
            self.catalogue.texts("category", "brand", joined=" "),
            one_per_prefix,
            chains=TraceChains(self.prompts, titles, traces, mention) if traces else None,
            set_order=set_order,
        )

    @abstractmethod
    def parser(self, *, reasoning: bool) -> Parse:
        """What takes completions apart: (completion_ids, cut) to `Parsed`."""

    def columns(self, items: Sequence[int] | np.ndarray) -> dict[str, Any]:
        """Keywords that rewards get about targets, beside their numbers."""
        return {}

    def observed(self, model: PreTrainedModel, rollouts: Rollouts, wanted: Collection[str]) -> dict[str, Any]:
        """Keywords that rewards get about rollouts: those it `gives`.

        Args:
            model: Causal LM below PEFT's wrapper, in evaluation mode.
            rollouts: What was written.
            wanted: Keywords that a reward asks for; the others need not be made.
        """
        return {}

    def levels(self, predicted: Parsed, target: np.ndarray) -> np.ndarray:
        """How much of each answer is right: codes from the first one on, or the item or nothing."""
        return (np.array(predicted.predicted_items) == target).astype(np.int64)

    def optimised(self, rollouts: Rollouts, target: np.ndarray, group_targets: np.ndarray) -> Rollouts:
        """The completions whose probability reinforcement learning raises or lowers: by default what was written.

        Args:
            rollouts: What was rolled out and chosen.
            target: (rows,) target of each.
            group_targets: Targets of all groups of all processes.
        """
        return rollouts

    def without_items(self, chain: Sequence[int]) -> list[int]:
        """A chain without the items it names, where they are codes."""
        return list(chain)

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Completions as text."""
        return list(self.tokenizer.batch_decode(ids, skip_special_tokens=True))

    def readable(self, chain: Sequence[int]) -> str:
        """A chain as text, with titles for items."""
        return str(self.tokenizer.decode(chain)).strip()


POLICIES: Registry[type[Policy]] = Registry("policy", [f"reasonrec.recipes.policies.{name}" for name in MODULES])


def build_policy(
    catalogue: Catalogue,
    setting: Setting,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    trust_remote_code: bool = False,
) -> Policy:
    """The policy of a setting.

    Args:
        catalogue: The items.
        setting: What training and inference agree on.
        tokenizer: The tokenizer, with or without the policy's tokens; the base model's by default.
        trust_remote_code: Run code that comes with the base model; off unless the user asks.

    Raises:
        UserError: If there is no such policy, or it does not fit.
    """
    if tokenizer is None:
        tokenizer = load_tokenizer(setting.base_model, trust_remote_code=trust_remote_code)
    return POLICIES.find(setting.policy).build(catalogue, setting, tokenizer)


def check_index(setting: Setting, index: str | None) -> ItemIndex | None:
    """The item index that a policy needs, or none.

    Args:
        setting: Names the policy.
        index: Folder of the index, if one was given.

    Raises:
        UserError: If there is no such policy, or the index is missing or not needed.
    """
    if POLICIES.find(setting.policy).with_codes:
        if index is None:
            raise UserError(f"policy={setting.policy} writes items as codes: set index (recipes/index_items.py)")
        return ItemIndex.load(index)
    if index is not None:
        raise UserError(
            f"index={index}, but policy={setting.policy} has no codes: leave it out, or choose one of "
            f"{', '.join(policies_with_codes())}"
        )
    return None


def check_rewards(setting: Setting, rewards: WeightedRewards) -> None:
    """Check that a policy gives what rewards read.

    Raises:
        UserError: If there is no such policy, or a reward demands what it does not have, such as codes.
    """
    POLICIES.find(setting.policy)
    given = {
        name: (*policy.gives, *(CODES if policy.with_codes else ())) for name, policy in POLICIES.entries().items()
    }
    rewards.check_policy(setting.policy, given)


def policies_with_codes() -> list[str]:
    """Names of the policies whose items are codes."""
    return [name for name, policy in POLICIES.entries().items() if policy.with_codes]


def _text_chunk(model: PreTrainedModel, hidden: Tensor, label: Tensor, temperature: float) -> Scored:
    log_probs = (text_logits(model, hidden) / temperature).log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return log_probs.gather(-1, label[:, None])[:, 0], entropy, log_probs.argmax(-1) == label


def text_log_probs(model: PreTrainedModel, hidden: Tensor, label: Tensor, *, temperature: float = 1.0) -> Scored:
    """Score text labels over the full vocabulary, in chunks that are recomputed in the backward pass.

    Args:
        model: Causal LM.
        hidden: (n, width) hidden states that predict the labels.
        label: (n,) token ids.
        temperature: What the logits are divided by.
    """
    parts = [
        checkpoint(_text_chunk, model, h, y, temperature, use_reentrant=False)
        for h, y in zip(hidden.split(TEXT_CHUNK), label.split(TEXT_CHUNK), strict=True)
    ]
    log_probs, entropy, top = (torch.cat(part) for part in zip(*parts, strict=True))
    return log_probs, entropy, top


def install(
    model: PreTrainedModel,
    answers: Answers,
    *,
    temperature: float = 1.0,
    answers_only: bool = False,
    soft: SoftScore | None = None,
) -> None:
    """Let the model answer `fused_lm_head=True`, by which TRL gets every log-probability, with a policy.

    Labels that are part of an answer are scored by the policy, words over the full vocabulary, whose head is computed
    for them alone. Losses, importance ratios, reference log-probabilities and distributed training stay TRL's. Install
    it after TRL's trainer was built (which installs its own answer), on the model below PEFT's wrapper.

    Args:
        model: Causal LM.
        answers: The policy's answers, on the model's device.
        temperature: What the logits are divided by: that of the sampler whose completions are scored.
        answers_only: The policy of rollouts: an answer is what stands behind the begin marker, and what follows a
            complete one is certain: log-probability 0. Otherwise, for supervised examples, see the policy.
        soft: Scores the answers of batches that have `TEACHER_ROWS`.
    """
    inner = model.forward

    def forward(self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return inner(*args, **kwargs)
        from trl.trainer.utils import FusedCausalLMOutput  # only who trains needs TRL

        labels, given = kwargs.pop("labels"), kwargs.pop("num_items_in_batch", None)
        told = kwargs.pop(TEACHER_ROWS, None)
        kwargs["use_cache"] = False
        if args:
            kwargs["input_ids"], args = args[0], args[1:]
        input_ids = kwargs["input_ids"]
        hidden = answers.hidden(self, labels, answers_only, kwargs)
        skipped = labels.shape[1] - 1 - hidden.shape[1]  # places in front that have no label
        target = labels[:, 1 + skipped :]
        mask = target != -100
        is_answer, is_text = (part[:, skipped:] for part in answers.split(input_ids, labels, answers_only))
        fields = [torch.zeros(target.shape, device=target.device) for _ in range(3)]
        # `+ 0 * hidden.sum()`: a batch without any label still reaches every parameter, as DDP requires.
        fields[0] = fields[0] + 0.0 * hidden.float().sum()
        row, position = is_answer.nonzero(as_tuple=True)
        if len(row):
            place, states = position + 1 + skipped, hidden[is_answer]
            if soft is None or told is None:
                scored = answers.log_probs(self, input_ids, row, place, states, temperature)
            else:
                scored = soft(self, input_ids, row, place, states, told)
            fields = [f.masked_scatter(is_answer, s.to(f.dtype)) for f, s in zip(fields, scored, strict=True)]
        if bool(is_text.any()):
            scored = text_log_probs(self, hidden[is_text], target[is_text], temperature=temperature)
            fields = [f.masked_scatter(is_text, s.to(f.dtype)) for f, s in zip(fields, scored, strict=True)]
        if skipped:
            fields, mask = [pad(f, (skipped, 0)) for f in fields], pad(mask, (skipped, 0))
        log_probs, entropy, top = fields
        count = mask.sum().clamp(min=1) if given is None else given
        return FusedCausalLMOutput(
            loss=-log_probs.sum() / count,
            log_probs=log_probs,
            entropy=entropy if answers_only else entropy.detach(),  # an entropy bonus needs its gradient
            is_top1=top.bool(),
            label_mask=mask,
        )

    model.forward = types.MethodType(forward, model)
