"""Whether a value is what a setting takes: the error that a user can mend, and numbers checked by kind and range.

Knows values and their names; knows no setting.
"""

# Values come from files and programs that anybody may have written: their types are checked at run time, whatever annotations promise.
# pyright: reportUnnecessaryIsInstance=false

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any, cast


class EyasError(ValueError):
    """An error a user can mend: the message is one line that says what is wrong and what to do."""


# How a RuntimeError says that memory is wanting: PyTorch's allocator on a CPU, C++ itself, torch.OutOfMemoryError, CUDA's libraries.
NO_MEMORY = re.compile(r"DefaultCPUAllocator|can't allocate memory|bad_alloc|out of memory|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE)
WANTED = re.compile(r"to allocate (\d+(?:\.\d+)?)\.? (bytes|[KMGTP]iB)")


@contextmanager
def within_memory(way_out: str | Callable[[], str]) -> Iterator[None]:
    """Raise `EyasError` in one line where the block runs out of memory, the machine's or a GPU's. `way_out`: what the user may lower, or
    what tells it then."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        wanted = WANTED.search(str(error))
        number = f" ({float(wanted[1]):,g} {wanted[2]} more were wanted)" if wanted else ""
        where = "the GPU" if "cuda" in f"{type(error).__name__} {error}".lower() else "this machine"
        raise EyasError(f"{where} is out of memory{number}; {way_out if isinstance(way_out, str) else way_out()}") from error


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and NO_MEMORY.search(str(error)) is not None)


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


def checked_bias(given: Mapping[Any, Any] | Sequence[tuple[Any, Any]] | None) -> tuple[tuple[int, float], ...]:
    """A logit bias, which may be a mapping and have its ids as text, or be None, as JSON has them."""
    given = {} if given is None else given
    try:
        pairs: list[tuple[Any, Any]] = [(token, value) for token, value in (given.items() if isinstance(given, Mapping) else given)]
    except (TypeError, ValueError):
        raise EyasError(f"logit-bias must be a mapping of token ids to numbers, not {short(given)}") from None
    pairs = [(int(token) if isinstance(token, str) and token.isdecimal() else token, value) for token, value in pairs]
    for token, value in pairs:
        check_number("a token of logit-bias", token, 0, LARGEST_SIZE, whole=True)
        check_number(f"the logit-bias of token {token}", value, -100, 100)
    return tuple(sorted(dict(pairs).items()))


# What transformers' apply_chat_template takes for itself; `tools` are a setting of their own.
NO_VARIABLES = (
    *("messages", "conversation", "tools", "add_generation_prompt", "continue_final_message", "tokenize", "padding", "truncation"),
    *("max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "sanitize_control_tokens"),
)


def check_variables(variables: Any) -> None:
    """Raise `EyasError` for anything but variables of a chat template by name."""
    if not isinstance(variables, Mapping):
        raise EyasError(f'chat-template-kwargs must be an object of variables like {{"enable_thinking": false}}, not {short(variables)}')
    for name in cast("Mapping[Any, Any]", variables):
        if not isinstance(name, str) or not name.isidentifier() or name in NO_VARIABLES:
            raise EyasError(f"chat-template-kwargs: {short(name)} is no variable that a chat template can be given")
