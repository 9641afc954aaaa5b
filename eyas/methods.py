"""The methods by name: for each the module that decodes with it and the module that teaches its draft. To add a method, add a line here or
`register` it from a plugin.

Knows names alone and imports nothing, so that `eyas --help` is quick. docs/add-a-method.md says what the modules hold.
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
    """A module that decodes with a method. The module of a method without a draft has `alone` and nothing else; that of a method that uses
    another method's draft has `drafter` and nothing else."""

    drafter: Callable[[Any, DraftVocab], Drafter]  # from the module's own kind of network
    alone: Callable[[TargetModel], Drafter]  # without a draft
    reads: Callable[[dict[str, Any], Path], bool]  # whether a directory with this config.json holds its draft
    check: Callable[[Path, TargetConfig], None]  # raises `EyasError` where a directory's draft does not fit the target
    load: Callable[[Path, TargetModel], tuple[DraftModule, DraftVocab]]  # for a target that is not yet prepared
    save: Callable[..., None]  # takes what the function takes that `saver` of files/draft_files.py returns


class Teaching(Protocol):
    """A module that teaches a method's draft."""

    SETTINGS: dict[str, Any]  # the fields of TrainSettings whose default is another one for this method
    new_network: Callable[[TargetModel, tuple[int, ...], DraftVocab, TrainSettings], DraftModule]  # target, taps, vocabulary, settings
    unroll: Callable[..., Iterator[Step]]  # network, batch, steps, depths=None
    loss: Callable[[Any, Batch, Supervision], tuple[Tensor, list[Tensor]]]  # -> the sum to minimise, and each step's mean to show


@dataclass(frozen=True)
class Method:
    """A method: the names of the modules that decode with it and teach its draft. They are imported when they are first used."""

    drafter: str  # name of the module that decodes with it, as `Decoding` says
    teaching: str | None = None  # name of the module that teaches its draft, as `Teaching` says; None: it has no draft of its own
    draft: str | None = None  # the method whose drafts it decodes with, often itself; None: it needs no draft
    static: bool = False  # its tree has a static shape that comes with the draft, unless another is asked for
    copy: bool = True  # copying may join its trees (drafters/copying.py)

    def decoding(self) -> Decoding:
        """Import the module that decodes."""
        return cast("Decoding", import_module(self.drafter))

    def training(self) -> Teaching:
        """Import the module that teaches; only for a method that has one."""
        assert self.teaching is not None, "this method has no draft to train"
        return cast("Teaching", import_module(self.teaching))


# Where one draft serves several methods, the first of them is the default.
METHODS: dict[str, Method] = {
    "eagle3": Method("eyas.drafters.eagle3", "eyas.train.eagle3", draft="eagle3"),
    "eagle2": Method("eyas.drafters.eagle2", draft="eagle1"),
    "eagle1": Method("eyas.drafters.eagle1", "eyas.train.eagle1", draft="eagle1", static=True),
    "medusa": Method("eyas.drafters.medusa", "eyas.train.medusa", draft="medusa", static=True),
    "mtp": Method("eyas.drafters.mtp", "eyas.train.mtp", draft="mtp"),
    "draft-model": Method("eyas.drafters.draft_model"),
    "lookup": Method("eyas.drafters.lookup", copy=False),
    "plain": Method("eyas.drafters.plain", copy=False),
}
COPY = "+copy"  # behind the name of a method whose trees copying joins
EARLIER = {"eagle3-lookup": "eagle3+copy"}  # names that some methods had, and how they are written now


def register(name: str, method: Method) -> None:
    """Add a method; from here on every command knows it. Both of its modules may be the file that calls this:
    `register("mine", Method(__name__, __name__, draft="mine"))`. Raises `EyasError` for a name that is taken, and for a
    method that would not find the draft that it trains."""
    if name in METHODS:
        raise EyasError(f"method {name!r} exists already; choose another name")
    if method.teaching and method.draft != name:
        raise EyasError(f"method {name!r} trains a draft but decodes with those of {method.draft!r}; write draft={name!r}")
    METHODS[name] = method


def method_named(name: str) -> Method:
    """The method of this name. Raises `EyasError`, which lists the names there are, for any other."""
    if name not in METHODS:
        raise EyasError(f"method {name!r} is unknown; choose {', '.join(METHODS)}")
    return METHODS[name]


def parted(written: str) -> tuple[str, bool | None]:
    """A method's name, and whether `+copy` behind it asks for copying (else None). Raises `EyasError` for a name that is not known."""
    now = EARLIER.get(written, written)
    name = now.removesuffix(COPY)
    method_named(name)
    return name, True if now != name else None


def copies(written: str, copy: bool | None, drawn: bool = False) -> bool:
    """Whether copying joins the trees of a method, as it is written: of every method that drafts, unless `copy` is False or the verifier
    reads `drawn` guesses alone. Raises `EyasError` where that contradicts what is asked for."""
    name, said = parted(written)
    if said and copy is False:
        raise EyasError(f"method {written} copies, and --no-copy was given too; drop one of the two")
    if not METHODS[name].copy:
        if copy or said:
            raise EyasError(f"copying joins the trees of a draft, and method {name} has none; method lookup is copying alone")
        return False
    if drawn and (copy or said):
        raise EyasError("copied guesses are not drawn, as this verifier needs them to be; drop --copy")
    return copy is not False and not drawn


def trained() -> list[str]:
    """The names of the methods that have a draft to train."""
    return [name for name, each in METHODS.items() if each.teaching]
