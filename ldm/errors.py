"""Errors that one line tells: mistakes of a user and faults of a machine. All others are bugs."""


class UserError(Exception):
    """Its message says what is wrong, where, and what to do. It is one line, of which ``several``
    make an exception, and empty where somebody else tells it.
    """

    several = False


class ConfigError(UserError, ValueError):
    """The config cannot be used; the message is one line."""


class DataError(UserError, ValueError):
    """The data cannot be used; the message is one line that says what is wrong, where, and what to
    do.
    """


class CheckpointError(UserError, ValueError):
    """A checkpoint cannot be used; the message is one line."""


class RunError(UserError, RuntimeError):
    """The run cannot go on; the message is one line."""


class ToldElsewhere(RunError):
    """Another process of the run tells why it ends."""


class DiskError(RunError):
    """Something could not be written; what was there before is whole. The message is one line."""


class BackendError(UserError, ValueError):
    """An attention backend cannot run here; the message says what is missing."""


class FeatureError(ValueError):
    """A space that cannot be had; the message is one line."""


class NotFiniteError(ValueError):
    """What was drawn is no picture; the message, one line, says where that arose."""
