"""The one exception that a user's mistake raises."""


class UserError(ValueError):
    """A mistake the user can mend: the message names the value, the rule and the fix.

    The launchable stages print it without a traceback and exit with status 2.
    """
