"""The policy over codes: at an answer's positions it is the softmax over the legal children in the trie.

`legal_log_probs` is that policy; the item search, training and the logits processor below share it. The processor is
for what has to go through `transformers.generate`, such as sampling; lists of items come from `decode.py`, which is
many times faster.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.trie import Trie
from reasonrec.tokenizers.vocabulary import Vocabulary


def check_vocabulary(trie: Trie, vocabulary: Vocabulary) -> None:
    """Refuse a trie and a vocabulary of different indexes.

    Raises:
        UserError: If they disagree on the number of codes of a level.
    """
    if trie.level_sizes != vocabulary.level_sizes:
        raise UserError(
            f"the item trie has levels of {trie.level_sizes} codes, the vocabulary {vocabulary.level_sizes}: they "
            "belong to different item indexes; build both from one"
        )


def legal_log_probs(logits: Tensor, child: Tensor, column: Tensor) -> Tensor:
    """Log-softmax over the legal children.

    Args:
        logits: (..., columns) logits of all code columns.
        child: (..., width) child nodes, -1 where there is none.
        column: (..., width) their columns.

    Returns:
        (..., width) log-probabilities; -inf where there is no child.
    """
    exists = child >= 0
    log_probs = logits.gather(-1, column).masked_fill(~exists, -torch.inf).log_softmax(-1)
    # Not NaN where a position has no child at all (padding); NaN logits stay NaN.
    return log_probs.masked_fill(~exists, -torch.inf)


class ItemLogitsProcessor(LogitsProcessor):
    """Lets `generate` write nothing but items behind the begin marker.

    It keeps no state: what is legal follows from the tokens behind the *last* begin marker of each row. So rows may
    be reordered, restarted, padded on the left, and reach their answers at different times, for instance after a
    free-form chain. Rows outside an answer are not touched. Inside an answer the legal codes get the policy's
    log-probabilities (so beam scores are log-probabilities of items), all other tokens -inf. Behind a complete item,
    and behind anything that is no beginning of an (allowed) item, only the end of the sequence is legal.

    Example:
        >>> processors = LogitsProcessorList([ItemLogitsProcessor(trie, vocabulary, tokenizer.eos_token_id)])
        >>> model.generate(**prompts, logits_processor=processors, max_new_tokens=trie.depth + 1)

    Args:
        trie: Trie of the items, on the model's device.
        vocabulary: Where the codes stand in the LLM's vocabulary.
        eos_id: Token id that ends the sequence.
        exclude: For each prompt the items that must not be written; the beams or samples of a prompt stand together.
        in_place: Overwrite the logits that are given, which `generate` has copied for that purpose. Turn it off with
            `output_logits=True`, which promises the logits as they were.
    """

    def __init__(
        self,
        trie: Trie,
        vocabulary: Vocabulary,
        eos_id: int,
        *,
        exclude: Sequence[Sequence[int] | np.ndarray] | None = None,
        in_place: bool = True,
    ) -> None:
        check_vocabulary(trie, vocabulary)
        self.trie = trie
        self.vocabulary = vocabulary
        self.in_place = in_place
        self.eos_id = eos_id
        self._users = 0 if exclude is None else len(exclude)
        self._excluded = None if exclude is None else trie.excluded_ranks(exclude)

    def nodes(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Where each row stands in the trie.

        Args:
            input_ids: (rows, length).

        Returns:
            Whether the row is inside an answer (rows,), and the node of its codes, -1 if they are no prefix (rows,).
        """
        trie, first_id = self.trie, self.vocabulary.first_id
        # An answer is never longer than the longest item, so nothing in front of these tokens matters.
        tail = input_ids[:, -(trie.depth + 1) :]
        length = tail.shape[1]
        place = torch.arange(1, length + 1, device=tail.device)
        start = ((tail == self.vocabulary.begin_id) * place).amax(1)  # 0: no marker
        node = torch.where(start > 0, 0, -1)
        over = start == 0
        for step in range(length - 1):
            at = start + step
            inside = at < length
            token = tail.gather(1, at.clamp(max=length - 1)[:, None])[:, 0]
            over = over | (inside & trie.is_leaf(node))  # something stands behind a complete item
            node = torch.where(inside, trie.child(node, token - first_id), node)
        return ~over, node

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Mask the logits of one step.

        Args:
            input_ids: (rows, length) tokens so far.
            scores: (rows, vocabulary) logits or log-probabilities.

        Returns:
            (rows, vocabulary), in place if so configured.
        """
        trie = self.trie
        active, node = self.nodes(input_ids)
        # On a CPU it costs nothing to ask how wide this step is; elsewhere it would wait for the device.
        edge, legal, column = trie.edges(node, None if node.device.type == "cpu" else max(trie.widths))
        # Places without a legal code all stand for the end, so that no place overwrites another's value.
        token = torch.where(legal, column + self.vocabulary.first_id, self.eos_id)
        log_probs = scores.gather(1, token).masked_fill_(~legal, -torch.inf).log_softmax(1)
        some = legal[:, 0]
        if self._excluded is not None:  # after normalising over all children, as everywhere
            legal = legal & trie.allowed(edge + 1, self._excluded_rows(len(scores)))
            token = torch.where(legal, token, self.eos_id)
            some = legal.any(1)
        # What the end of the sequence gets: rows outside answers (which have no legal code either) keep their logit.
        end = torch.where(some, -torch.inf, 0.0).to(scores.dtype)
        end = torch.where(active, end, scores[:, self.eos_id])[:, None]
        masked = scores if self.in_place else scores.clone()
        if node.device.type == "cpu" and bool(active.all()):
            masked.fill_(-torch.inf)  # the codes' values were taken before
        else:  # adding is the fastest way to overwrite rows without asking the device which
            masked.add_(torch.where(active, -torch.inf, 0.0).to(scores.dtype)[:, None])
        return masked.scatter_(1, token, torch.where(legal, log_probs, end))

    def _excluded_rows(self, rows: int) -> Tensor | None:
        if self._excluded is None:
            return None
        if rows % self._users:
            raise UserError(f"items are excluded for {self._users} prompts, but generate has {rows} rows")
        return self._excluded.repeat_interleave(rows // self._users, 0)
