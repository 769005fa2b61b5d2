"""Numbers that a caller gives in Python: whole ones in a range, and lists of item numbers."""

from __future__ import annotations

import numbers
from typing import TYPE_CHECKING, Any

from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.terminal import shown

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

INT64 = 2**63 - 1  # what arrays and tensors hold
MAX_SEED = 2**32 - 1  # what every library takes


def whole(name: str, value: Any, *, at_least: int, at_most: int = INT64) -> int:
    """A whole number in a range, of Python or NumPy.

    Args:
        name: What it is called where it was given.
        value: What was given; truth values, floats and text are no whole numbers.
        at_least: Smallest that is allowed.
        at_most: Largest that is allowed.

    Raises:
        UserError: If it is none, or out of range.
    """
    if isinstance(value, numbers.Integral) and not isinstance(value, bool) and at_least <= int(value) <= at_most:
        return int(value)
    rule = f"at least {at_least}" if at_most == INT64 else f"from {at_least} to {at_most:,}"
    raise UserError(f"{name}={shown(value)} has to be a whole number, {rule}")


def item_numbers(name: str, values: Any) -> NDArray[np.int64]:
    """A list of item numbers as an array (n,); whether they are in a catalogue is not checked.

    Raises:
        UserError: If it is no list of whole numbers of 64 bits.
    """
    import numpy as np  # who reads a configuration needs none

    try:
        array = np.asarray(values)
    except ValueError:  # lists of several lengths
        array = np.zeros((0, 0))
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise UserError(f"{name}={shown(values)} has to be a list of item numbers, which are whole numbers from 0 on")
    return array.astype(np.int64)
