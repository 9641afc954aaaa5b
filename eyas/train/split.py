"""A target too large for one device: the weights of its layers are split over the processes that train together, and its states go to
whoever trains on them.

Each process holds its share of every layer. A layer's weights are gathered when a pass reaches it and forgotten behind it (PyTorch's
`fully_shard`), so each process reads examples of its own, with the sums and the bits of a target that is whole; any number of processes
will do, and any family. Embedding, last norm and head are whole in each. Since every pass takes all processes, all read at once: before a
step's workers begin, and wherever all ask for the same. Knows targets, processes and examples; knows nothing of drafts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from eyas import launched
from eyas.config import EyasError
from eyas.files.target import load_target
from eyas.model.adapter import AdaptedTarget, decoder_layers
from eyas.model.protocols import TargetModel
from eyas.model.target import Target
from eyas.train.features import Example, KeptStates, States, TargetStates
from eyas.train.parallel import Ranks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

FILLER = Example([0], [-1])  # what a process reads while others read examples


def check_split(writes: bool) -> None:
    """Raise `EyasError` where a target cannot be split: for one process, or where it is to write."""
    if launched.count() == 1:
        how = "start it as `torchrun --nproc-per-node N -m eyas train ..`"
        raise EyasError(f"--split-target splits the target over several processes, and this is one; {how}")
    if writes:
        raise EyasError(
            "--split-target: a target that is split reads text and writes none; bring text with --data, --text, --shards or --writer"
        )
    import torch.distributed.fsdp  # noqa: F401  (before the processes meet; eyas/parallel/peers.py, join_group)


def load_split(directory: Path, device: str, ranks: Ranks) -> TargetModel:
    """The target with its layers' weights split over all processes, in bfloat16 on CUDA. Called by all at once; those of one machine load
    one after another, so that its memory holds one whole target at most. Raises as `load_target` does, and for a layer that cannot be
    split."""
    precision, target = ("bf16" if device.startswith("cuda") else "fp32"), None
    if device.startswith("cuda"):
        torch.cuda.set_device(device)  # where shares are made
    mesh = mesh_on(device)
    for turn in range(launched.count_here()):
        if turn == int(os.environ.get("LOCAL_RANK", launched.rank())):
            target = split(load_target(directory, precision), mesh).to(device)
        ranks.wait()
    assert target is not None, "each process has a turn"
    return target


def mesh_on(device: str) -> DeviceMesh:
    """All processes, each with a device of this type. Called by all at once."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(torch.device(device).type, (launched.count(),))


def split(target: TargetModel, mesh: DeviceMesh) -> Target | AdaptedTarget:
    """Keep this process's share of each layer of a target that is whole and not prepared, on its device. What is no layer stays where it
    is. Asks no other process."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    def even(parameter: nn.Parameter) -> Shard:
        """Along which axis it is split: the first that all processes can share evenly, since a layer may have fewer experts than these."""
        return Shard(next((axis for axis, size in enumerate(parameter.shape) if size % mesh.size() == 0), 0))

    assert isinstance(target, Target | AdaptedTarget), "a target is one or the other"
    layers = decoder_layers(target.model if isinstance(target, Target) else target.trunk, target.config.num_hidden_layers)
    assert layers is not None, "every target has them"
    kind = {"mesh": mesh, "shard_placement_fn": even}
    shared = {id(parameter) for parameter in layers.parameters()}
    whole = {parameter for parameter in target.parameters() if id(parameter) not in shared}
    try:
        for layer in layers:
            fully_shard(layer, reshard_after_forward=True, **kind)
        fully_shard(target, ignored_params=whole, **kind)  # one root, so that a layer's weights come while the one before computes
    except (ValueError, NotImplementedError) as error:
        raise EyasError(f"the layers of this target cannot be split ({str(error).splitlines()[0]})") from None
    if isinstance(target, Target):
        target.layers_stay = True
    return target


class SplitStates:
    """States from a target that is split. An example has a home, the process that reads it first; that one may keep its states, and hands
    them to whoever needs them."""

    def __init__(self, source: TargetStates | KeptStates, ranks: Ranks) -> None:
        self.kept = source if isinstance(source, KeptStates) else None
        reads = source.source if isinstance(source, KeptStates) else source
        assert isinstance(reads, TargetStates), "what is kept was read from a target"
        self.reads, self.source, self.ranks = reads, source, ranks
        self.homes: dict[int, tuple[Example, int]] = {}  # by id; an example that is held here keeps its id
        self.ahead: dict[int, list[Tensor]] = {}  # of the step under way: states of this process's examples

    def states(self, examples: Sequence[Example]) -> States:
        """Within a step of this process's examples; else called in all processes at once, for the same ones."""
        count = self.ranks.count
        found = self.ahead or self.read([examples[rank::count] for rank in range(count)], [examples] * count)
        return States(*map(torch.cat, zip(*(found[id(example)] for example in examples), strict=True)))

    @contextmanager
    def step(self, parts: Sequence[Sequence[Example]]) -> Iterator[None]:
        """A step in which process r of n trains on every n-th of these parts of a batch, from part r on. Called in all at once; within the
        block `states` asks nobody."""
        count = self.ranks.count
        dealt = [[example for part in parts[rank::count] for example in part] for rank in range(count)]
        self.ahead = self.read(dealt, dealt)
        try:
            yield
        finally:
            self.ahead = {}

    @torch.no_grad()
    def read(self, dealt: Sequence[Sequence[Example]], needed: Sequence[Sequence[Example]]) -> dict[int, list[Tensor]]:
        """The states of the examples that this process needs, by id. `dealt`: for each process the examples whose home it becomes where
        they have none; `needed`: those that each process needs."""
        own = self.ranks.rank
        for home, examples in enumerate(dealt):
            for example in examples:
                self.homes.setdefault(id(example), (example, home))
        sent = [[example for example in examples if self.homes[id(example)][1] == own] for examples in needed]
        came = [[example for example in needed[own] if self.homes[id(example)][1] == home] for home in range(self.ranks.count)]
        states = self.at_home(list({id(example): example for examples in sent for example in examples}.values()))
        lengths = [[sum(len(example.tokens) for example in examples) for examples in way] for way in (sent, came)]
        columns: list[Sequence[Tensor]] = []
        for column in range(len(States._fields)):
            rows = [states[id(example)][column] for examples in sent for example in examples]
            found = self.ranks.exchange(torch.cat([self.nothing()[column], *rows]), *lengths)
            columns.append(found.split([len(example.tokens) for examples in came for example in examples]))
        parts = map(list, zip(*columns, strict=True))
        return {id(example): part for example, part in zip((each for examples in came for each in examples), parts, strict=True)}

    def at_home(self, examples: Sequence[Example]) -> dict[int, tuple[Tensor, ...]]:
        """The states of examples whose home this is, by id. One pass of all processes, unless all keep what they are asked for."""
        missing = self.kept.missing(examples) if self.kept else examples
        if self.ranks.any(len(missing) > 0, self.reads.target.device) and not missing:
            self.reads.states([FILLER])
        if not examples:
            return {}
        columns = (column.split([len(example.tokens) for example in examples]) for column in self.source.states(examples))
        return {id(example): part for example, part in zip(examples, zip(*columns, strict=True), strict=True)}

    def nothing(self) -> States:
        """The states of no token: their widths and number formats."""
        target = self.reads.target
        kind = {"dtype": torch.bfloat16 if self.kept else target.dtype, "device": target.device}
        width = target.config.hidden_size
        argmax = torch.zeros(0, dtype=torch.int64, device=target.device)
        return States(torch.zeros(0, len(self.reads.taps) * width, **kind), torch.zeros(0, width, **kind), argmax)


def whole(weights: nn.Module) -> dict[str, Tensor]:
    """A module's tensors by name, whole in every process. Called in all at once where they are split."""
    return {name: gather() if (gather := getattr(tensor, "full_tensor", None)) else tensor for name, tensor in weights.state_dict().items()}
