"""What a request about runs and data may be answered."""


class Conflict(RuntimeError):
    """Things are not as whoever asks takes them to be; the message is one line."""
