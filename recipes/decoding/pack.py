"""Several users' tokens in one row of the input: a forward pass costs what its tokens cost, not its padding."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# What attention and copying cost beside the weights' matrix products: so many keys that a token sees, or slots that
# are copied for a row, as much as one token more. Rough figures for a small model on a CPU, where it matters most.
_KEYS, _SLOTS = 1024, 128


@dataclass(frozen=True)
class Packing:
    """Where the tokens of a forward pass stand in its input, whose rows hold several users each.

    Attributes:
        row: (tokens,) row of each token.
        column: (tokens,) its column.
        user: (tokens,) whose it is.
        place: (tokens,) how many of the user's new tokens stand in front of it.
        nth: (tokens,) place of its user among those of its row.
        users: (rows, most) the users of each row; filled up with any.
        width: Columns of a row.
        shared: Columns at the start of each row that stand for the first tokens of all its users.
    """

    row: Tensor
    column: Tensor
    user: Tensor
    place: Tensor
    nth: Tensor
    users: Tensor
    width: int
    shared: int

    @classmethod
    def of(cls, counts: Sequence[int], device: torch.device, *, shared: int = 0, before: int = 0) -> Packing | None:
        """Pack tokens.

        Args:
            counts: New tokens of each user; 0 is allowed.
            device: Of the tensors.
            shared: How many of them all users begin with, fewer than any has.
            before: Slots that each user has filled.

        Returns:
            The packing, or None where a row per user costs less.
        """
        groups = group(counts, shared=shared, before=before)
        if groups is None:
            return None
        most = max(map(len, groups))
        spans: list[tuple[int, ...]] = []
        lengths: list[int] = []
        width = total = 0
        for row, members in enumerate(groups):
            end = shared
            for nth, user in enumerate(members):
                spans.append((row, user, nth, end - shared, total))
                lengths.append(counts[user])
                total += counts[user]
                end += counts[user] - shared
            width = max(width, end)
        repeats = torch.tensor(lengths, device=device)
        fields = torch.tensor(spans, device=device).T.repeat_interleave(repeats, dim=1, output_size=total)
        of_row, user, nth, skip, start = fields
        place = torch.arange(total, device=device) - start
        column = torch.where(place < shared, place, place + skip)
        users = torch.tensor([members + members[:1] * (most - len(members)) for members in groups], device=device)
        return cls(of_row, column, user, place, nth, users, width, shared)

    def put(self, values: Tensor) -> Tensor:
        """From (users, new) to (rows, width); 0 where no token stands."""
        packed = values.new_zeros(len(self.users), self.width)
        packed[self.row, self.column] = values[self.user, self.place]
        return packed

    def take(self, states: Tensor, new: int, users: int) -> Tensor:
        """From (rows, width, size) back to (users, new, size)."""
        taken = states.new_zeros(users, new, states.shape[2])
        taken[self.user, self.place] = states[self.row, self.column]
        return taken

    def mask(self, seen: Tensor, before: int) -> Tensor:
        """What each token attends to: the filled slots of each user of its row, side by side, then the row itself.

        Args:
            seen: (users, new, before + new) what it attends to among its user's slots.
            before: Slots that are filled.

        Returns:
            (rows, width, most * before + width) bool.
        """
        rows, most = self.users.shape
        past = seen.new_zeros(rows, self.width, most, before)
        past[self.row, self.column, self.nth] = seen[self.user, self.place, :before]
        owner, place = (self.row.new_full((rows, self.width), fill) for fill in (-1, 0))
        owner[self.row, self.column], place[self.row, self.column] = self.user, self.place
        owner[:, : self.shared] = self.users[:, :1]
        among = seen[owner.clamp(min=0)[:, :, None], place[:, :, None], before + place[:, None]]
        same = owner[:, :, None] == owner[:, None]
        same[..., : self.shared] = True
        itself = torch.eye(self.width, dtype=torch.bool, device=seen.device)  # padding too has to see something
        return torch.cat([past.flatten(2), (among & same) | itself], 2)

    def write(self, buffer: Tensor, states: Tensor, before: int, new: int) -> Tensor:
        """Put keys or values into their users' slots.

        Args:
            buffer: (users, heads, capacity, size) the cache.
            states: (rows, heads, width, size) of the packed tokens.
            before: Slots that are filled.
            new: Slots that each user gets; those without a token become 0.

        Returns:
            (rows, heads, most * before + width, size) what the rows attend to.
        """
        buffer[:, :, before : before + new] = 0
        buffer[self.user, :, before + self.place] = states[self.row, :, self.column]
        if before == 0:
            return states
        past = buffer[self.users, :, :before]  # (rows, most, heads, before, size)
        return torch.cat([past.transpose(1, 2).flatten(2, 3), states], 2)


def group(counts: Sequence[int], *, shared: int = 0, before: int = 0) -> list[list[int]] | None:
    """Choose which users share a row, by what that costs.

    Args:
        counts: New tokens of each user.
        shared: How many of them stand once in each row.
        before: Slots that each user has filled, which are copied where users share a row.

    Returns:
        The users of each row, or None where a row per user costs least.
    """
    best = len(counts) * max(counts) * (1 + (before + max(counts)) / _KEYS)
    chosen = None
    own = [count - shared for count in counts]
    rows = len(counts)
    while rows > 1:
        rows = min(rows - 1, round(rows / 1.1))
        groups = spread(own, rows)
        width = shared + max(sum(own[user] for user in members) for members in groups)
        most = max(map(len, groups))
        cost = len(groups) * (width * (1 + (most * before + width) / _KEYS) + most * before / _SLOTS)
        if cost < best:
            best, chosen = cost, groups
    return chosen


def spread(sizes: Sequence[int], rows: int) -> list[list[int]]:
    """Spread users over rows evenly: each, the largest first, goes into the emptiest; who has nothing is left out.

    Args:
        sizes: Of the users.
        rows: How many rows.

    Returns:
        Numbers of those in each row; rows without any are left out.
    """
    members: list[list[int]] = [[] for _ in range(rows)]
    emptiest = [(0, row) for row in range(rows)]
    for user in sorted((i for i, size in enumerate(sizes) if size), key=lambda i: -sizes[i]):
        filled, row = emptiest[0]
        members[row].append(user)
        heapq.heapreplace(emptiest, (filled + sizes[user], row))
    return [users for users in members if users]
