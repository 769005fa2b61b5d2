"""What is no longer a training: a loss, a gradient, a weight or a rollout that is not finite, or hopelessly large."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from reasonrec.recipes.models.shards import local
from reasonrec.tokenizers.errors import UserError

LARGEST = torch.finfo(torch.float32).max ** 0.5  # the square of anything larger is infinite in float32
SKIPPED_IN_A_ROW = 20  # loss scaling halves its scale each time: by then it is not the scale

Made = TypeVar("Made")


def diverged(step: int, what: str, lower: Mapping[str, float | None], more: str = "") -> UserError:
    """The error of a training that cannot come back.

    Args:
        step: Optimiser step, counted from 1.
        what: What is wrong, such as `the loss is nan`.
        lower: Names and values of the settings to lower; those that are None are left out, and one of 0 that limits
            something (`max_grad_norm`) is off and has to be set.
        more: Another way out.
    """
    known = {name: value for name, value in lower.items() if value is not None}
    rates = [f"{name}={value:g}" for name, value in known.items() if name != "max_grad_norm"]
    ways = [f"lower {' and '.join(rates)}"]
    if "max_grad_norm" in known:
        limit = known["max_grad_norm"]
        ways.append(f"max_grad_norm={limit:g}" if limit else "set max_grad_norm=1")
    return UserError(f"training diverged at step {step}: {what}; {', or '.join([*ways, *filter(None, [more])])}")


def bad_number(numbers: Mapping[str, float]) -> str | None:
    """Says which of some numbers is not finite, if one is.

    Args:
        numbers: Name to value.

    Example:
        >>> bad_number({"loss": 0.5, "gradient norm": float("inf")})
        'the gradient norm is inf'
    """
    return next((f"the {name} is {value}" for name, value in numbers.items() if not math.isfinite(value)), None)


def bad_tensor(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """Says which of some tensors holds a value that is not finite or above `LARGEST`, if one does.

    Args:
        named: Name and tensor, of any shape and floating dtype; of one that processes share out, this one's part.

    Returns:
        The first bad one and its largest value, or None.
    """
    for name, tensor in named:
        part = local(tensor.detach())
        if part.numel() == 0:
            continue
        low, high = (float(value) for value in part.aminmax())  # NaN goes through both
        value = high if not abs(low) > abs(high) else low
        if not abs(value) <= LARGEST:
            return f"the weights {name} hold {value:g}"
    return None


def trained_tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """Name and tensor of everything that trains."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def check_trained(model: nn.Module) -> None:
    """Refuse to keep weights that nothing can be computed with.

    Args:
        model: A model; what trains in it is looked at.

    Raises:
        UserError: If a value is not finite, or so large that its square is not; names the first tensor.
    """
    if (bad := bad_tensor(trained_tensors(model))) is not None:
        raise UserError(f"training diverged: {bad}, so nothing was saved; lower learning_rate or max_grad_norm")


@contextmanager
def overflow_diverges(error: Callable[[str], UserError]) -> Iterator[None]:
    """Turn what some optimisers raise where a step does not fit into float32 into the error of a training.

    Args:
        error: Makes it from what is wrong.
    """
    try:
        yield
    except RuntimeError as problem:
        if "without overflow" not in str(problem):
            raise
        raise error("the optimiser's step is too large for float32") from problem


def from_all(compute: Callable[[], Made]) -> list[Made]:
    """What each process computed; what one of them cannot is raised in all, so that none waits for it.

    Args:
        compute: What this process does.

    Raises:
        UserError: A user's mistake in any process.
        FloatingPointError: Numbers that are not finite in any process.
    """
    from accelerate.utils import gather_object

    mine: Made | UserError | FloatingPointError
    try:
        mine = compute()
    except (UserError, FloatingPointError) as error:
        mine = error
    parts = gather_object([mine])
    for part in parts:
        if isinstance(part, UserError | FloatingPointError):
            raise part
    return list(parts)
