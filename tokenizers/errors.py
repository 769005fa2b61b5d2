"""The one exception that a user's mistake raises."""

from reasonrec.tokenizers.terminal import visible

MAX_MESSAGE_CHARS = 3000  # a message quotes ids, cells and names, and these may be of any length


class UserError(ValueError):
    """A mistake the user can mend: the message names the value, the rule and the fix.

    The launchable stages print it without a traceback and exit with status 2. It often quotes what others wrote, so
    its message is made `visible`: on one line, without control characters, and not longer than a screen.
    """

    def __init__(self, message: str) -> None:
        super().__init__(visible(message, MAX_MESSAGE_CHARS))
