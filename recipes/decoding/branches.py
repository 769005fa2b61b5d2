"""Several continuations of each prompt behind one reading of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reasonrec.recipes.decoding.backbone import all_done
from reasonrec.recipes.decoding.prefix import Prefix, forward

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Lanes:
    """The continuations of each prompt, side by side in one sequence: a lane sees the prompt and itself.

    Args:
        model: The model that read the prompts.
        prefix: The prompts, with a slot left for every token that any lane will read.
        lanes: Continuations of each prompt.

    Attributes:
        hidden: (prompts, lanes, width) last hidden state of each lane: what predicts its next token.
        position: (prompts, lanes) position of its next token.
        number: (prompts, lanes) which continuation of its prompt each lane is.
        given: (prompts, codes) tokens that every answer to a prompt begins with, -1 behind them; None for none.
    """

    given: Tensor | None = None

    def __init__(self, model: PreTrainedModel, prefix: Prefix, lanes: int) -> None:
        rows, device = len(prefix.position), prefix.position.device
        self.model = model
        self.cache = prefix.cache
        self.hidden = prefix.hidden[:, None].expand(-1, lanes, -1)
        self.position = prefix.position[:, None].expand(-1, lanes)
        self.seen = prefix.seen[:, None].expand(rows, lanes, -1)  # (prompts, lanes, slots)
        self.lane = torch.arange(lanes, device=device)
        self.number = self.lane.expand(rows, lanes)

    def feed(self, token: Tensor, active: Tensor) -> None:
        """Let the active lanes read one token each.

        Args:
            token: (prompts, lanes) token ids.
            active: (prompts, lanes) whether a lane goes on.
        """
        width = int(active.sum(1).max())
        if all_done(width):
            return
        # Active lanes first, so that a step is only as wide as the prompt with most of them.
        order = (~active).to(torch.int8).argsort(dim=1, stable=True)[:, :width]
        used = active.gather(1, order)
        own = (self.lane[:, None] == order[:, None, :]) & used[:, None, :]  # (prompts, lanes, width)
        self.seen = torch.cat([self.seen, own], 2)
        seen = self.seen.gather(1, order[..., None].expand(-1, -1, self.seen.shape[2]))
        hidden = forward(self.model, self.cache, token.gather(1, order), self.position.gather(1, order), seen)
        place = order[..., None].expand_as(hidden)
        new = torch.where(used[..., None], hidden, self.hidden.gather(1, place))
        self.hidden = self.hidden.scatter(1, place, new)
        self.position = self.position + active

    def prefixes(self, room: int) -> Prefix:
        """Every lane as a row of its own: the only time that states are copied.

        Args:
            room: Slots to keep behind each.
        """
        own = self.seen.flatten(0, 1)  # (prompts * lanes, slots)
        longest = int(own.sum(1).max())
        slots = (~own).to(torch.int8).argsort(dim=1, stable=True)[:, :longest]
        cache = self.cache.pick(torch.arange(len(own), device=own.device) // len(self.lane), slots, room)
        return Prefix(cache, own.gather(1, slots), self.position.flatten(), self.hidden.flatten(0, 1))
