"""Codes as tokens of the LLM.

The code tokens are *ordinary* added tokens: special ones would vanish where TRL decodes completions before it calls
the rewards. They get consecutive ids: first the begin marker, which opens every answer, then the columns of the trie.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from reasonrec.tokenizers.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BEGIN = "<|item|>"
_CODE = re.compile(r"<\|[a-z]_\d+\|>")


def code_token(level: int, code: int) -> str:
    """The token of a code, such as `<|a_12|>`."""
    return f"<|{chr(ord('a') + level)}_{code}|>"


@dataclass(frozen=True)
class Vocabulary:
    """Where the code tokens stand in the LLM's vocabulary.

    Attributes:
        level_sizes: Number of codes of each level, the disambiguation level last.
        begin_id: Token id of the begin marker; the code columns follow it.
    """

    level_sizes: tuple[int, ...]
    begin_id: int

    @property
    def first_id(self) -> int:
        """Token id of column 0."""
        return self.begin_id + 1

    @property
    def n_columns(self) -> int:
        """Number of code tokens."""
        return sum(self.level_sizes)

    @property
    def token_ids(self) -> list[int]:
        """Ids of all new tokens, the begin marker first."""
        return list(range(self.begin_id, self.first_id + self.n_columns))

    @property
    def size(self) -> int:
        """Rows the LLM's embedding needs at least."""
        return self.first_id + self.n_columns

    def item_token_ids(self, codes: np.ndarray) -> list[list[int]]:
        """Token ids of each item.

        Args:
            codes: (items, levels) integer codes; -1 pads the end of shorter items.
        """
        first = self.first_id + np.concatenate([[0], np.cumsum(self.level_sizes)[:-1]])
        ids = np.where(codes >= 0, codes + first, -1)
        return [row[row >= 0].tolist() for row in ids]

    @classmethod
    def extend(cls, tokenizer: PreTrainedTokenizerBase, level_sizes: Sequence[int]) -> Vocabulary:
        """Add the code tokens to a tokenizer, or find them where they were added before.

        Raises:
            UserError: If the tokenizer holds code tokens of another index.
        """
        from transformers import AddedToken

        names = [
            BEGIN,
            *(code_token(level, code) for level, size in enumerate(level_sizes) for code in range(size)),
        ]
        known = tokenizer.get_vocab()
        present = [name for name in known if name == BEGIN or _CODE.fullmatch(name)]
        if not present:
            tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in names])
        ids = tokenizer.convert_tokens_to_ids(names)
        if (present and set(present) != set(names)) or ids != list(range(ids[0], ids[0] + len(names))):
            raise UserError(
                f"the tokenizer already has {len(present)} code tokens, and they are not the {len(names)} of this "
                "index: it belongs to another index; start from the original tokenizer of the base model"
            )
        return cls(tuple(int(size) for size in level_sizes), ids[0])
