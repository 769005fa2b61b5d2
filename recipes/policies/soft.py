"""Soft targets over codes: part of a supervised loss goes to what a teacher would recommend at the same place.

At each level of an answer, over the legal children c of the codes before it,

    loss = − Σ_c ỹ(c) log P(c),        ỹ = (1 − α) · one-hot + α · teacher(c)

teacher(c) is what the teacher gives to its items below c, over what it gives to all below the same codes. Where none
of its items has these codes it says nothing, and the level is one-hot.

One rule for what a history masks: no target asks for it, neither the teacher's nor, as ever, the one-hot one, and the
policy P is the softmax over *all* legal children that it is everywhere else. If training alone took masked items out
of that softmax, it would train another policy than the one that is sampled and ranked, and nothing would keep that one
from giving its probability to what is masked afterwards; and α → 0 would not lead back to plain training.

After TCA4Rec (https://arxiv.org/abs/2601.18457), with the cross-entropy in place of its log of a sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reasonrec.recipes.decoding.answers import Scored
from reasonrec.recipes.policies.semantic_id import CodeAnswers, chosen_from, prefix_nodes, scored

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def child_shares(child: Tensor, node: Tensor, share: Tensor) -> Tensor:
    """What a teacher's items give to siblings.

    Args:
        child: (n, width) siblings as `Trie.children` gives them: consecutive numbers, then -1.
        node: (n, k) the node of each of the teacher's items on the siblings' level, wherever it stands; -1 for none.
        share: (n, k) what the teacher gives to each of them.

    Returns:
        (n, width); items that are below none of the siblings do not count.
    """
    place = node - child[:, :1]  # (n, k)
    below = (place >= 0) & (place < (child >= 0).sum(-1, keepdim=True))
    place = place.clamp(0, child.shape[1] - 1)
    return torch.zeros_like(child, dtype=share.dtype).scatter_add_(1, place, torch.where(below, share, 0))


def soft_log_likelihood(log_probs: Tensor, is_target: Tensor, shares: Tensor, alpha: float) -> Tensor:
    """The negative of the loss above.

    Args:
        log_probs: (n, width) log P of the children, -inf where there is none.
        is_target: (n, width) the one-hot target.
        shares: (n, width) what the teacher gives to each child, not normalised; all 0 where it says nothing.
        alpha: The teacher's part, in [0, 1].

    Returns:
        (n,).
    """
    finite = torch.where(log_probs > -torch.inf, log_probs, 0)
    own = torch.where(is_target, finite, 0).sum(-1)
    total = shares.sum(-1)
    says = total > 0
    taught = (shares * finite).sum(-1) / torch.where(says, total, 1)
    return torch.where(says, (1 - alpha) * own + alpha * taught, own)


@dataclass
class SoftCodes:
    """Scores code labels by soft targets; `install` takes it.

    Attributes:
        answers: The policy's answers.
        items: (positions, k) the teacher's items at each position; those behind its last one are any.
        shares: (positions, k) what it gives to each; 0 behind its last one.
        alpha: The teacher's part.
    """

    answers: CodeAnswers
    items: Tensor
    shares: Tensor
    alpha: float

    def __call__(
        self, model: PreTrainedModel, input_ids: Tensor, row: Tensor, position: Tensor, hidden: Tensor, told: Tensor
    ) -> Scored:
        """Score labels as `Answers.log_probs` does, with the soft log-likelihood in place of the log-probability.

        Args:
            model: Causal LM below PEFT's wrapper.
            input_ids: (batch, length) token ids; they hold the labels.
            row: (n,) batch row of each label.
            position: (n,) its position there.
            hidden: (n, width) hidden states that predict the labels.
            told: (batch, length) the number of each label's position here, -1 for none.
        """
        trie, vocabulary = self.answers.trie, self.answers.vocabulary
        node = prefix_nodes(trie, vocabulary, input_ids, row, position)
        choice = chosen_from(model, trie, vocabulary, hidden, node, input_ids[row, position])
        number = told[row, position].to(self.items.device)  # the table stays where it has room
        items = self.items[number.clamp(min=0)].to(node.device).long()  # (n, k)
        shares = torch.where(number[:, None] >= 0, self.shares[number.clamp(min=0)], 0).to(node.device)
        tree = self.answers.tree
        below = tree.nodes[items, tree.level[choice.target][:, None]]  # (n, k)
        said = child_shares(choice.child, below, shares)
        _, entropy, top = scored(choice)
        return soft_log_likelihood(choice.log_probs, choice.is_target, said, self.alpha), entropy, top
