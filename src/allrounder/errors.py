"""The one exception for what a person gave: the command line prints its sentence and stops."""


class InputError(ValueError):
    """Wrong input: the message names what was given, what was expected and what to do."""
