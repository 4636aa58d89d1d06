"""The one exception that means "the user's mistake"."""


class ConfigError(ValueError):
    """Something the user gave cannot be used: a key, a value, a file.

    The message is one line and names the key or file, the value, and what would be valid. A command that ends with it
    prints `error: <message>` and exits with code 2.
    """
