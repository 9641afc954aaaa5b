"""Whether a value is what a setting takes: the error that a user can mend, and numbers checked by kind and range.

Knows values and their names; knows no setting.
"""

# Values come from files and programs that anybody may have written: their types are checked at run time, whatever annotations promise.
# pyright: reportUnnecessaryIsInstance=false

from __future__ import annotations

from numbers import Integral, Real
from typing import Any


class EyasError(ValueError):
    """An error a user can mend: the message is one line that says what is wrong and what to do."""


LARGEST_SIZE = 1 << 24  # the largest width or vocabulary that is believed


def is_number(value: Any, whole: bool = False) -> bool:
    """Whether this is a number, Python's or numpy's; a truth value is none."""
    return not isinstance(value, bool) and isinstance(value, Integral if whole else Real)


def check_number(name: str, value: Any, least: float, most: float, whole: bool = False) -> None:
    """Raise `EyasError` for anything but a number of this range."""
    if not is_number(value, whole) or not least <= value <= most:
        raise EyasError(f"{name} must be a {'whole ' * whole}number from {least:g} to {most:g}, not {short(value)}")


def short(value: Any) -> str:
    """A value as text for a message of one line."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
