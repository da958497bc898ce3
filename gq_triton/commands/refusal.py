"""The refusal of a command: one line that says what is wrong, and exit code 2."""

import argparse
from typing import NoReturn

__all__ = ["Parser", "Refusal"]


class Refusal(Exception):
    """The reason why a command cannot begin, in one line for the user."""

    def __init__(self, reason: object) -> None:
        super().__init__(" ".join(str(reason).split()))


class Parser(argparse.ArgumentParser):
    """A parser that refuses in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Raise the message as a ``Refusal``."""
        raise Refusal(message)
