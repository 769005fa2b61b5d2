"""Semantic IDs: an item is a tuple of codes, and an answer a softmax over the legal children in the item trie.

The policy that is trained is the policy that recommends: labels that are codes are scored as the decoder scores them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from reasonrec.recipes.decoding.answers import Answers, Choices, Scored
from reasonrec.recipes.decoding.backbone import all_done
from reasonrec.recipes.decoding.merge_chains import chains_room, search_chains
from reasonrec.recipes.decoding.prefix import Prefix
from reasonrec.recipes.decoding.prior import Prior, Tree
from reasonrec.recipes.decoding.sample import Sampler, Step, check_finite, draw
from reasonrec.recipes.decoding.score import read_prefixes, score_items
from reasonrec.recipes.decoding.search import Exclude, Found, search, search_room
from reasonrec.recipes.models.checkpoint import Setting
from reasonrec.recipes.models.load import add_code_rows
from reasonrec.recipes.policies.base import POLICIES, Parse
from reasonrec.recipes.policies.codes import CodePolicy, split_codes
from reasonrec.rewards.parse import Parsed
from reasonrec.rewards.prefix import common_prefix
from reasonrec.tokenizers.catalogue import Catalogue
from reasonrec.tokenizers.constrain import legal_log_probs
from reasonrec.tokenizers.registry import check_options
from reasonrec.tokenizers.rows import code_logits
from reasonrec.tokenizers.trie import Trie
from reasonrec.tokenizers.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from reasonrec.recipes.decoding.branches import Lanes


def prefix_nodes(trie: Trie, vocabulary: Vocabulary, input_ids: Tensor, row: Tensor, position: Tensor) -> Tensor:
    """Trie node of the codes that stand before each code label.

    Args:
        trie: Trie of the items.
        vocabulary: Where the codes stand.
        input_ids: (batch, length) token ids.
        row: (n,) batch row of each label.
        position: (n,) position of each label in its row; `input_ids` holds the label there.

    Returns:
        (n,) node numbers, -1 where the codes before the label are no prefix of an item.
    """
    ends = torch.tensor(vocabulary.level_sizes, device=input_ids.device).cumsum(0)
    level = torch.searchsorted(ends, input_ids[row, position] - vocabulary.first_id, right=True)
    node = torch.zeros_like(row)
    for back in range(len(vocabulary.level_sizes) - 1):
        inside = back < level
        column = input_ids[row, (position - level + back).clamp(min=0)] - vocabulary.first_id
        node = torch.where(inside, trie.child(node, column), node)
    return node


class Choice(NamedTuple):
    """What code labels were chosen from.

    Attributes:
        log_probs: (n, width) of the legal children, -inf where there is none.
        child: (n, width) these nodes, -1 where there is none.
        target: (n,) the label's node.
    """

    log_probs: Tensor
    child: Tensor
    target: Tensor

    @property
    def is_target(self) -> Tensor:
        """(n, width)."""
        return self.child == self.target[:, None]


def chosen_from(
    model: PreTrainedModel,
    trie: Trie,
    vocabulary: Vocabulary,
    hidden: Tensor,
    node: Tensor,
    label: Tensor,
    *,
    temperature: float = 1.0,
) -> Choice:
    """The policy over the legal children of code labels' prefixes.

    Args:
        model: Causal LM.
        trie: Trie of the items.
        vocabulary: Where the codes stand.
        hidden: (n, width) hidden states that predict the labels.
        node: (n,) prefix node of each label.
        label: (n,) token id of each label.
        temperature: What the logits are divided by.

    Raises:
        ValueError: If a label does not continue its prefix to an item of the catalogue.
    """
    target = trie.child(node, label - vocabulary.first_id)
    if bool((target < 0).any()):
        raise ValueError(
            "a code label does not continue a prefix of the item trie: the data was made with another index"
        )
    child, column = trie.children(node)
    log_probs = legal_log_probs(code_logits(model, hidden, vocabulary) / temperature, child, column)
    return Choice(log_probs, child, target)


def scored(choice: Choice) -> Scored:
    """Log-probability, entropy and whether the label is the most probable child, each (n,)."""
    log_probs, is_target = choice.log_probs, choice.is_target
    legal = choice.child >= 0
    finite = torch.where(legal, log_probs, 0)
    entropy = -(finite.exp() * finite * legal).sum(-1)
    return (
        torch.where(is_target, finite, 0).sum(-1),
        entropy,
        is_target.gather(-1, log_probs.argmax(-1, keepdim=True))[:, 0],
    )


def item_log_probs(
    model: PreTrainedModel,
    trie: Trie,
    vocabulary: Vocabulary,
    hidden: Tensor,
    node: Tensor,
    label: Tensor,
    *,
    temperature: float = 1.0,
) -> Scored:
    """Score code labels over the legal children of their prefixes: `scored` of what they were `chosen_from`."""
    return scored(chosen_from(model, trie, vocabulary, hidden, node, label, temperature=temperature))


class CodeAnswers(Answers):
    """Answers that are codes.

    Args:
        trie: Trie of the items.
        vocabulary: Where the codes stand.
    """

    def __init__(self, trie: Trie, vocabulary: Vocabulary) -> None:
        self.trie, self.vocabulary = trie, vocabulary
        self.begin_id, self.longest = vocabulary.begin_id, trie.depth
        self._tree: Tree | None = None

    def to(self, device: torch.device | str) -> None:
        """See `Answers`."""
        self.trie, self._tree = self.trie.to(device), None

    def room(self, width: int, chains: int = 1) -> int:
        """Slots for the beams, and behind several chains for scoring what any of them proposed."""
        return search_room(self.trie, width) if chains == 1 else chains_room(self.trie, width, chains)

    def scored_room(self, n: int) -> int:
        """Slots for the prefixes of `n` items."""
        return sum(min(n, nodes) for nodes in self.trie.branching)

    def rank(
        self,
        model: PreTrainedModel,
        prefix: Prefix,
        *,
        k: int,
        width: int,
        exclude: Exclude | None = None,
        exact: bool = False,
        chains: int = 1,
        prior: Prior | None = None,
    ) -> Found:
        """The item search; behind several chains, what each of them finds."""
        if chains > 1 or width < k:  # a list longer than what a chain proposes
            return search_chains(
                model, self.trie, self.vocabulary, prefix, chains=chains, k=k, num_beams=width, exclude=exclude
            )
        excluded = None if exclude is None else self.trie.excluded_ranks(exclude)
        return search(
            model,
            self.trie,
            self.vocabulary,
            prefix,
            k=k,
            num_beams=width,
            excluded=excluded,
            exact=exact,
            prior=prior,
        )

    def score(self, model: PreTrainedModel, prefix: Prefix, items: Tensor, prior: Prior | None = None) -> Tensor:
        """See `Answers`."""
        return score_items(model, self.trie, self.vocabulary, prefix, items, prior=prior)

    @property
    def tree(self) -> Tree:
        """The trie without its codes."""
        if self._tree is None:
            everything = torch.arange(self.trie.n_items, device=self.trie.offsets.device)
            self._tree = Tree(self.trie.paths(everything), self.trie.n_nodes)
        return self._tree

    def choices(self, model: PreTrainedModel, prefix: Prefix, items: Tensor) -> Choices:
        """See `Answers`; where one item is left, nothing is chosen."""
        read = read_prefixes(model, self.trie, self.vocabulary, prefix, items[:, None])
        log_probs = legal_log_probs(code_logits(model, read.hidden, self.vocabulary), read.child, read.column)
        return Choices(log_probs, read.child)

    def write(self, lanes: Lanes, sampler: Sampler, uniform: Tensor | None, steps: list[Step]) -> Tensor:
        """Draw code by code; those without an alternative are nobody's choice."""
        trie, vocabulary, shape = self.trie, self.vocabulary, lanes.position.shape
        node = torch.zeros(shape, dtype=torch.int64, device=lanes.position.device)
        for level in range(trie.depth):
            active = trie.leaf_item(node) < 0
            if all_done(int(active.sum())):
                break
            logits = code_logits(lanes.model, lanes.hidden, vocabulary) / sampler.temperature
            check_finite(logits, f"code {level}")
            child, column = trie.children(torch.where(active, node, -1))  # (prompts, lanes, width)
            log_probs = legal_log_probs(logits, child, column).flatten(0, 1)
            noise = None if uniform is None else uniform[..., sampler.max_chain + level].flatten()
            drawn, gain = draw(log_probs, noise)
            if lanes.given is not None and level < lanes.given.shape[1]:
                wanted = lanes.given[:, level, None, None] - vocabulary.first_id
                fits = ((column == wanted) & (child >= 0)).flatten(0, 1)  # nowhere if nothing is given
                drawn = torch.where(fits.any(-1), fits.int().argmax(-1), drawn)
                gain = log_probs.gather(1, drawn[:, None])[:, 0]
            node = torch.where(active, child.flatten(0, 1).gather(1, drawn[:, None])[:, 0].view(shape), node)
            token = vocabulary.first_id + column.flatten(0, 1).gather(1, drawn[:, None])[:, 0].view(shape)
            steps.append((token, gain.view(shape), (child >= 0).sum(-1) > 1, active))
            lanes.feed(token, active & (trie.leaf_item(node) < 0))
        return trie.leaf_item(node)

    def split(self, input_ids: Tensor, labels: Tensor, answers_only: bool) -> tuple[Tensor, Tensor]:
        """Codes are answers."""
        return split_codes(self.vocabulary, input_ids, labels, answers_only)

    def log_probs(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        row: Tensor,
        position: Tensor,
        hidden: Tensor,
        temperature: float,
    ) -> Scored:
        """Over the legal children of what stands before each code."""
        node = prefix_nodes(self.trie, self.vocabulary, input_ids, row, position)
        label = input_ids[row, position]
        return item_log_probs(model, self.trie, self.vocabulary, hidden, node, label, temperature=temperature)


class SemanticIds(CodePolicy):
    """The LLM reads and writes items as codes, which are new tokens."""

    name, with_tree = "semantic_id", True
    answers: CodeAnswers

    @classmethod
    def build(cls, catalogue: Catalogue, setting: Setting, tokenizer: PreTrainedTokenizerBase) -> SemanticIds:
        """See `Policy`.

        Raises:
            UserError: If the items have no codes, or there are options.
        """
        check_options(f"the policy {cls.name}", setting.policy_options, ())
        index = catalogue.codes
        vocabulary = Vocabulary.extend(tokenizer, index.level_sizes)
        prompts = cls.code_prompts(tokenizer, setting, vocabulary, index)
        answers = CodeAnswers(Trie.from_codes(index.codes, index.level_sizes), vocabulary)
        return cls(catalogue, tokenizer, prompts, answers)

    @property
    def trie(self) -> Trie:
        """Trie of all items."""
        return self.answers.trie

    def start(self, model: PreTrainedModel) -> None:
        """Add the rows of the codes, each from the text of its items."""
        texts = self.catalogue.texts("title", "category", "brand")
        add_code_rows(model, self.tokenizer, self.vocabulary, self.index.codes, texts)

    def card(self) -> dict[str, str]:
        """How many codes there are."""
        *sizes, last = self.index.level_sizes
        return {"item codes": f"{' × '.join(map(str, sizes))}, {last} to tell equal ones apart"}

    def parser(self, *, reasoning: bool) -> Parse:
        """See `rewards.parse`."""
        return self.code_parser(self.vocabulary, reasoning=reasoning)

    def levels(self, predicted: Parsed, target: np.ndarray) -> np.ndarray:
        """Codes shared with the target from the first one on."""
        pairs = zip(predicted.predicted_codes or [], (self.tuples[item] for item in target), strict=True)
        return np.array([common_prefix(p, t) if p else 0 for p, t in pairs], dtype=np.int64)


POLICIES.add(SemanticIds.name, SemanticIds, __name__)
