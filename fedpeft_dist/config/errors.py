"""Errors that end a command with one line, and how an error's text becomes one line."""


class ConfigError(ValueError):
    """Something the user gave cannot be used: a key, a value, a file.

    The message is one line and names the key or file, the value, and what would be valid. A command that ends with it
    prints `error: <message>` and exits with code 2.
    """


class FirstToldError(ConfigError):
    """The user's mistake, found on at least one rank of a group. This rank prints it."""


class ToldElsewhereError(ConfigError):
    """The user's mistake, found on at least one rank of a group. Another rank prints it."""


class MachineFaultError(RuntimeError):
    """This machine computes wrongly, which no config can mend. A command prints it in one line; exit code 1."""


class PeerLostError(RuntimeError):
    """Another rank, or the group's store, has died, failed or fallen silent, so that this rank cannot go on.

    Args:
        is_told: whether this rank prints the error; the others end silently.
    """

    def __init__(self, message: str, is_told: bool):
        super().__init__(message)
        self.is_told = is_told


def one_line(told: object, most: int | None = None) -> str:
    """The text of an error on one line, cut after `most` characters; the name of its class if it has no text."""
    text = " ".join(str(told).split()) or type(told).__name__
    return text if most is None or len(text) <= most else f"{text[:most]}..."
