"""A draft in SGLang (0.5.23) on the CPU, method EAGLE3, chains and trees: each round, each tree and the draft's own logits beside ours.

    python benchmarks/engines/run_sglang.py --prompts F.jsonl [--tree 8x2x4] [--precision fp32|bf16] [--serve]

SGLang's CPU kernels are not packaged: sglang/README.md says what ran in their place. Runs nothing of SGLang itself
(sglang_child.py does). Named run_sglang.py, since a file sglang.py beside the child would be what the child imports as sglang.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from harness import HERE, Job, compare, exported, loaded, make_job, options, paths, report, run_child
from torch import Tensor

from eyas.bench.environments import environment, workplace
from eyas.config import TreeShape
from eyas.decode.grow import Level
from eyas.drafters.eagle3 import Eagle3Drafter
from eyas.engine import draft_directory
from eyas.files.eagle3_files import load_draft
from eyas.measure.replay import features_of, replay
from eyas.model.rows import Segment

FOLDER = HERE / "sglang"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
INSTALLS = (("install", "--no-deps", "--extra-index-url", TORCH_INDEX, "-r", str(FOLDER / "requirements.txt")),)
ENVIRON = {
    "PYTHONPATH": f"{FOLDER / 'standin'}:{FOLDER}",
    "SGLANG_USE_CPU_ENGINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
}


class Pass(NamedTuple):
    """What SGLang's draft class read and gave: R rows; H draft width, D draft vocabulary."""

    tokens: Tensor  # [R]
    positions: Tensor  # [R]
    features: Tensor  # [R, 3H] of the target, or [R, H] its own earlier outputs
    logits: Tensor  # [R, D], or [1, D] of the last row where the prompt was read


def passes(file: Path) -> Iterator[Pass]:
    with open(file, "rb") as recorded:
        while recorded.peek(1):
            yield Pass(*(torch.from_numpy(numpy.load(recorded)) for _ in Pass._fields))


class BranchDrafter(Eagle3Drafter):
    """Sees in a tree what SGLang's draft sees: not a node's ancestors, but the nodes of its own rank in each level read before.

    SGLang keeps `top_k` branches of cache slots, one for each rank. A node takes its feature from its parent, but its branch's slots keep
    what was written there, whosever ancestor that is. Nodes at depths 1 and 2 are the same either way, and so are chains.
    """

    def read_level(self, levels: list[Level]) -> Tensor:
        return super().read_level([level._replace(sight=branch_sight(*level.sight.mask.shape)) for level in levels])


def branch_sight(rows: int, columns: int) -> Tensor:
    return torch.eye(rows, dtype=torch.bool).repeat(1, columns // rows)


@torch.inference_mode()
def logits_difference(file: Path, drafter: Eagle3Drafter, longest: int) -> dict[str, Any]:
    """Our draft on the same tokens, positions and features as SGLang's, pass by pass, each over its own cache."""
    network, wide = drafter.network, 3 * drafter.network.config.target_hidden_size
    drafter.reserve(1, longest)
    found = {"passes": 0, "rows": 0, "rows_with_another_first": 0, "greatest_logit": 0.0, "greatest_difference": 0.0}
    level, squares, count = 0, 0.0, 0
    for one in passes(file):
        features, rows = one.features.to(network.dtype), len(one.tokens)
        level = 0 if features.shape[1] == wide else level + 1
        if level < 2:  # the text, or the first level behind it: what was read after this place is no part of the text
            drafter.cache.cut(0, int(one.positions[0]))
        sight = branch_sight(rows, level * rows) if level else None
        g = features if level else network.fuse(features)
        a = drafter.read(one.tokens.tolist(), g, one.positions.tolist(), [Segment(0, rows, sight)])
        ours = network.logits(a)[-len(one.logits) :]
        off = (ours - one.logits).double()
        squares, count = squares + float(off.square().sum()), count + off.numel()
        found["passes"] += 1
        found["rows"] += len(ours)
        found["greatest_logit"] = max(found["greatest_logit"], float(ours.abs().max()))
        found["greatest_difference"] = max(found["greatest_difference"], float(off.abs().max()))
        found["rows_with_another_first"] += int((ours.argmax(-1) != one.logits.argmax(-1)).sum())
    return found | {"root_mean_square_difference": (squares / count) ** 0.5}


def places(prompt: list[int], steps: Sequence[int]) -> list[int]:
    """Of the roots of rounds, in the text."""
    return [len(prompt) + sum(steps[:done]) for done in range(len(steps))]


def tree_agreement(job: Job, result: dict[str, Any], target: Any, drafter: Eagle3Drafter) -> dict[str, Any]:
    """SGLang's trees beside ours on its own text, as sets of paths; rounds that differ in length make later ones begin elsewhere."""
    shape = TreeShape(*job.tree)
    found = dict.fromkeys(("prompts_with_equal_steps", "rounds", "rounds_at_places_of_ours", "equal_trees", "nodes", "equal_nodes"), 0)
    columns = (job.prompts, *(result[key] for key in ("tokens", "steps", "chains", "parents")))
    for prompt, tokens, steps, chains, parents in zip(*columns):
        text = prompt + tokens
        walked = replay(drafter, features_of(target, text, drafter.network.config.taps), text, len(prompt), shape)
        ours = {place: paths(tree.tokens, tree.parents) for place, tree in zip(places(prompt, walked.steps), walked.trees)}
        found["prompts_with_equal_steps"] += steps == walked.steps
        found["rounds"] += len(steps)
        for place, chain, above in zip(places(prompt, steps), chains, parents):
            if place in ours:
                theirs = paths([text[place], *chain], above)
                found["rounds_at_places_of_ours"] += 1
                found["equal_trees"] += theirs == ours[place]
                found["nodes"] += len(theirs) - 1
                found["equal_nodes"] += len(theirs & ours[place]) - 1
    return found


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--serve", action="store_true", help="ask SGLang's OpenAI server a question too")
    chosen = parser.parse_args()
    name = f"sglang-{chosen.tree.replace(':', '')}"
    place = workplace("sglang")
    job = make_job(chosen, exported(chosen.draft, chosen.target, "sglang", place))
    environ = ENVIRON | {"EAGLE3_SERVE": "1" if chosen.serve else ""}
    result = run_child(environment("sglang", INSTALLS), HERE / "sglang_child.py", job, place, **environ)
    report(name, chosen, job, result, compare(job, result, chosen.draft) | closer(job, result, chosen.draft, place / "record"))


def closer(job: Job, result: dict[str, Any], draft: str | None, record: Path) -> dict[str, Any]:
    """Logits beside ours, as we run and in float64 (what SGLang's own rounding amounts to); and where there are trees also these."""
    target, network, vocab = loaded(job, draft, job.precision)
    longest = max(len(prompt) + job.max_tokens for prompt in job.prompts) + 2 * job.tree[0]

    wide, _ = load_draft(draft_directory(draft or "bundled", Path(job.target)), target.embedding.detach(), torch.float64)
    found: dict[str, Any] = {
        f"draft_logits_beside_ours_in_{name}": logits_difference(record / "passes.npy", Eagle3Drafter(one.prepare(), vocab), longest)
        for name, one in ((job.precision, network), ("float64", wide))
    }
    if job.tree[2] > 1:
        for name, kind in (("trees", Eagle3Drafter), ("trees_seeing_branches", BranchDrafter)):
            found[name] = tree_agreement(job, result, target, kind(network, vocab))
    return found


if __name__ == "__main__":
    main()
