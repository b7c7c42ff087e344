"""The one exception for what a user can mend: the command line shows its message in one line and exits with 2."""


class UserError(ValueError):
    """Wrong input: the message says what was wrong, where, and what to do."""
