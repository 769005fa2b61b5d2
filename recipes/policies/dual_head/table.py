"""Exact nearest items in a table of vectors: the maths of ranking, without a model.

Rows stand in the order in which equal scores rank (popularity, then item number), and are read in blocks, so that a
list for one user costs about one reading of the table from memory, and lists for many users little more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BLOCK = 1 << 15  # rows scored at a time: scores of 64 users then fit into the caches


class Best(NamedTuple):
    """The best rows of a table.

    Attributes:
        rows: (queries, k) row numbers, best first, of equal scores the lower one first; -1 where there are fewer.
        log_probs: (queries, k) float32 log-softmax over the whole table, excluded rows included; -inf there.
    """

    rows: Tensor
    log_probs: Tensor


def products(queries: Tensor, vectors: Tensor) -> Tensor:
    """Products in float32, whatever is autocast around: (queries, width) and (rows, width) to (queries, rows).

    A cosine over 0.05 is about 20, where neighbours in bfloat16 are 0.125 apart: most items would have equal scores,
    and a loss over them no gradient that means anything.
    """
    with torch.autocast(queries.device.type, enabled=False):
        return queries.float() @ vectors.float().T


def best_rows(
    table: Tensor,
    queries: Tensor,
    k: int,
    *,
    temperature: float,
    exclude: Sequence[np.ndarray] | None = None,
    block: int = BLOCK,
) -> Best:
    """Rows with the largest products, exactly.

    Args:
        table: (rows, width) float32.
        queries: (queries, width) float32.
        k: Length of the lists.
        temperature: What products are divided by.
        exclude: For each query the rows that must not appear; they count in the softmax.
        block: Rows scored at a time.
    """
    n, device = len(queries), queries.device
    queries = queries / temperature
    rows = torch.full((n, k), -1, dtype=torch.int64, device=device)
    scores = torch.full((n, k), -torch.inf, device=device)
    total = torch.full((n,), -torch.inf, device=device)
    for start in range(0, len(table), block):
        part = products(queries, table[start : start + block])  # (queries, block)
        total = torch.logaddexp(total, part.logsumexp(1))
        for query, excluded in enumerate(exclude or ()):
            inside = excluded[(excluded >= start) & (excluded < start + block)] - start
            part[query, torch.from_numpy(inside).to(device)] = -torch.inf
        values, found = _first(part, min(k, part.shape[1])) if start == 0 else _above(part, scores[:, -1:])
        # What stood before has lower numbers: behind a stable sort it stays in front of its equals.
        values = torch.cat([scores, values], 1)
        numbers = torch.cat([rows, found + start], 1)
        scores, order = values.sort(dim=1, descending=True, stable=True)
        scores, rows = scores[:, :k], numbers.gather(1, order[:, :k])
    rows = rows.masked_fill(scores == -torch.inf, -1)
    return Best(rows, scores - total[:, None])


def _above(scores: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """Scores above a bound of each row (rows, 1), and their columns, in the order of columns.

    Behind the first block few are, and to look for them costs less than to sort.
    """
    row, column = (scores > bound).nonzero(as_tuple=True)
    counts = row.bincount(minlength=len(scores))
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    shape = (len(scores), max(counts.tolist(), default=0))
    values, columns = scores.new_full(shape, -torch.inf), row.new_zeros(shape)
    values[row, place], columns[row, place] = scores[row, column], column
    return values, columns


def _first(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The largest scores (rows, k) and their columns, the lower one first where they are equal."""
    values, columns = scores.topk(k, dim=1)
    last = values[:, -1:]
    # `topk` takes any of those that equal the last one.
    for row in ((scores >= last).sum(1) > k).nonzero()[:, 0].tolist():
        columns[row] = scores[row].sort(descending=True, stable=True).indices[:k]
    columns = columns.sort(1).values
    order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True).indices
    columns = columns.gather(1, order)
    return scores.gather(1, columns), columns
