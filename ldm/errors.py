"""Errors that one line tells: mistakes of a user and faults of a machine. All others are bugs."""


class UserError(Exception):
    """Its message says what is wrong, where, and what to do. It is one line, of which ``several``
    make an exception, and empty where somebody else tells it.
    """

    several = False


class ConfigError(UserError, ValueError):
    """The config cannot be used; the message is one line."""
