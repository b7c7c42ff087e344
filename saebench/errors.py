"""The two exceptions that are addressed to a person: the command line shows their message in one line."""


class UserError(ValueError):
    """Wrong input: the message says what was wrong, where, and what to do. Exit code 2."""


class Interrupted(Exception):
    """Work stopped on request, with everything saved; the message says how to continue. Exit code 130."""


class NotFinite(UserError):
    """NaN or Inf where numbers are needed."""
