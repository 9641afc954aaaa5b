"""The methods there are: for each the module that decodes with it and the one that teaches its draft. To add one is to add a line here, or
to `register` it from a plugin.

Knows names alone and imports nothing, so that `eyas --help` is quick. What the modules hold is told in docs/add-a-method.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from eyas.config import EyasError, TargetConfig, TrainSettings

if TYPE_CHECKING:
    from torch import Tensor

    from eyas.decode.drafter import Drafter
    from eyas.model.protocols import DraftModule, TargetModel
    from eyas.model.vocab import DraftVocab
    from eyas.train.unroll import Batch, Step, Supervision


class Decoding(Protocol):
    """A module that decodes. Of a method without a draft it has `alone` alone, of one with another's draft `drafter` alone; a network is of
    the module's own kind."""

    drafter: Callable[[Any, DraftVocab], Drafter]
    alone: Callable[[TargetModel], Drafter]
    reads: Callable[[dict[str, Any], Path], bool]
    check: Callable[[Path, TargetConfig], None]
    load: Callable[[Path, TargetModel], tuple[DraftModule, DraftVocab]]
    save: Callable[..., None]  # as files/draft_files.py's `saver` has it


class Teaching(Protocol):
    """A module that teaches a method's draft."""

    SETTINGS: dict[str, Any]
    new_network: Callable[[TargetModel, tuple[int, ...], DraftVocab, TrainSettings], DraftModule]
    unroll: Callable[..., Iterator[Step]]  # network, batch, steps, depths=None
    loss: Callable[[Any, Batch, Supervision], tuple[Tensor, list[Tensor]]]


@dataclass(frozen=True)
class Method:
    drafter: str  # module that decodes with it
    teaching: str | None = None  # module that teaches its draft, where it has one to train
    draft: str | None = None  # the method whose drafts it decodes with; None: it needs none
    static: bool = False  # its tree's shape is the draft's own, unless another is asked for

    def decoding(self) -> Decoding:
        return cast("Decoding", import_module(self.drafter))

    def training(self) -> Teaching:
        assert self.teaching is not None, "this method has no draft to train"
        return cast("Teaching", import_module(self.teaching))


# of those that one draft serves the first is the default
METHODS: dict[str, Method] = {
    "eagle3-lookup": Method("eyas.drafters.merged", draft="eagle3"),
    "eagle3": Method("eyas.drafters.eagle3", "eyas.train.eagle3", draft="eagle3"),
    "eagle2": Method("eyas.drafters.eagle2", draft="eagle1"),
    "eagle1": Method("eyas.drafters.eagle1", "eyas.train.eagle1", draft="eagle1", static=True),
    "medusa": Method("eyas.drafters.medusa", "eyas.train.medusa", draft="medusa", static=True),
    "mtp": Method("eyas.drafters.mtp", "eyas.train.mtp", draft="mtp"),
    "draft-model": Method("eyas.drafters.draft_model"),
    "lookup": Method("eyas.drafters.lookup"),
    "plain": Method("eyas.drafters.plain"),
}


def register(name: str, method: Method) -> None:
    """Add a method of one's own: from here on every command knows it. Its modules are named, and may both be the file that calls this:
    `register("mine", Method(__name__, __name__, draft="mine"))`."""
    if name in METHODS:
        raise EyasError(f"method {name!r} exists already; choose another name")
    METHODS[name] = method


def method_named(name: str) -> Method:
    if name not in METHODS:
        raise EyasError(f"method {name!r} is unknown; choose {', '.join(METHODS)}")
    return METHODS[name]


def trained() -> list[str]:
    """The methods that have a draft to train."""
    return [name for name, each in METHODS.items() if each.teaching]
