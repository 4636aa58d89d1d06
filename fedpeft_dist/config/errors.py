"""The exception for the user's mistakes, and how an error's text becomes one line."""


class ConfigError(ValueError):
    """Something the user gave cannot be used: a key, a value, a file.

    The message is one line and names the key or file, the value, and what would be valid. A command that ends with it
    prints `error: <message>` and exits with code 2.
    """


def one_line(told: object, most: int | None = None) -> str:
    """The text of an error on one line, cut after `most` characters; the name of its class if it has no text."""
    text = " ".join(str(told).split()) or type(told).__name__
    return text if most is None or len(text) <= most else f"{text[:most]}..."
