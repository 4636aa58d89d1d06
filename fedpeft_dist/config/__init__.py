"""Configuration: schema.py says what a key is, load.py reads files, errors.py is the user's mistake."""
