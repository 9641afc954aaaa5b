"""The draft's head: every token of a restricted vocabulary scored, against a low-rank scorer whose best 128 are scored exactly.

    python benchmarks/draft_head.py PROMPTS.jsonl [--ranks 32,64,128] [--limit 20] [--out F.json]

Time: microseconds from the draft's normed state to its best four children, for 1, 4 and 10 rows, the heads taking turns; medians. Recall:
of states the draft really had on these prompts, the share whose best child, and of whose best four the share, that a head finds. Tau: real
rounds (chain:3 and 60x7x10) with that head in the draft. The low-rank scorer is the best of its rank for states of `dev_prompts.jsonl`:
W ~ U (U^T W) with U the leading left singular vectors of W C^1/2. The full vocabulary's head is the draft's own row where it has one, and
the target's, from which the draft's rows began, where it has none: its times are those of any such head, its tau is not one of a draft
trained so.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import eyas
from eyas.bench.prompts import read_prompts
from eyas.config import GREEDY
from eyas.decode.score import best_children, log_scores
from eyas.drafters.eagle3 import Eagle3Drafter
from eyas.engine import BUNDLED, Engine
from eyas.files.eagle3_files import load_draft
from eyas.kernels.linear import Dense
from eyas.model.vocab import DraftVocab

ROWS, TURNS, TREES = (1, 4, 10), 400, ("chain:3", "60x7x10")
EXACT, CHILDREN = 128, 4  # tokens scored exactly; children compared
DEV = Path(__file__).parent / "dev_prompts.jsonl"

Head = Callable[[Tensor], Tensor]


def packed(weight_OI: Tensor) -> Dense:
    layer = nn.Linear(*reversed(weight_OI.shape), bias=False, dtype=torch.bfloat16)
    layer.weight = nn.Parameter(weight_OI.bfloat16(), requires_grad=False)
    dense = Dense(layer)
    dense.pack(torch.float32, 8)
    return dense


class LowRank:
    """Logits [N, D] of which a row's best 128 are exact, the others of low rank."""

    def __init__(self, weight_DH: Tensor, states_NH: Tensor, rank: int) -> None:
        values, vectors = torch.linalg.eigh(states_NH.T @ states_NH / len(states_NH))
        root_HH = vectors * values.clamp(min=0).sqrt()
        seen_DH = weight_DH @ root_HH  # the left singular vectors by way of the small square: D is large, H is not
        _, right_HH = torch.linalg.eigh(seen_DH.T @ seen_DH)
        left_DR = torch.linalg.qr(seen_DH @ right_HH[:, -rank:]).Q
        self.down, self.up = packed(left_DR.T @ weight_DH), packed(left_DR)
        self.weight_DH = weight_DH.bfloat16().float()

    def __call__(self, x_NH: Tensor) -> Tensor:
        logits_ND = self.up(self.down(x_NH))
        ids = logits_ND.topk(EXACT, -1, sorted=False).indices
        exact = torch.bmm(self.weight_DH[ids], x_NH.float().unsqueeze(-1)).squeeze(-1)
        return logits_ND.scatter_(1, ids, exact)


def heads_of(engine: Engine, ranks: list[int], states_NH: Tensor) -> dict[str, tuple[Head, DraftVocab, Tensor]]:
    """Name -> head, vocabulary and exact weights, for the bundled draft's vocabulary and for the target's whole one."""
    network, vocab = load_draft(BUNDLED, engine.target.embedding, torch.bfloat16)
    own_DH = network.lm_head.weight.detach().float()
    full_VH = engine.target.embedding.detach().float().clone()  # tied to the target's head
    full_VH[vocab.ids] = own_DH
    every = DraftVocab(range(vocab.vocab_size), vocab.vocab_size)
    found: dict[str, tuple[Head, DraftVocab, Tensor]] = {}
    for which, weight, ids in ((f"{len(vocab)} tokens", own_DH, vocab), (f"{len(every)} tokens", full_VH, every)):
        found[f"{which}, all scored"] = (packed(weight), ids, weight)
        for rank in ranks:
            found[f"{which}, rank {rank} and the best {EXACT}"] = (LowRank(weight, states_NH, rank), ids, weight)
    return found


def states_on(engine: Engine, prompts: list[str], tokens: int) -> Tensor:
    """[N, H]: the normed states from which a draft growing 60x7x10 trees scored children."""
    drafter, seen = eagle3(engine), []
    head = drafter.network.head
    drafter.network.head = lambda x: seen.append(x.float()) or head(x)
    engine.makers["eagle3"] = lambda: drafter
    engine.generate(prompts, method="eagle3", tree=TREES[-1], max_new_tokens=tokens, batch=1)
    return torch.cat(seen)


def eagle3(engine: Engine) -> Eagle3Drafter:
    network, vocab = load_draft(BUNDLED, engine.target.embedding, torch.bfloat16)
    return Eagle3Drafter(network.prepare(8), vocab)


def timed(heads: dict[str, tuple[Head, DraftVocab, Tensor]], states_NH: Tensor) -> dict[str, dict[int, float]]:
    """Median microseconds of a level's logits and best children, by rows."""
    seconds: dict[str, dict[int, list[float]]] = {name: {rows: [] for rows in ROWS} for name in heads}
    for turn in range(TURNS):
        for rows in ROWS:
            x = states_NH[turn * rows % 1000 : turn * rows % 1000 + rows]
            for name, (head, _, _) in heads.items():
                started = time.perf_counter()
                best_children(log_scores(head(x), GREEDY, None), CHILDREN)
                seconds[name][rows].append(time.perf_counter() - started)
    return {name: {rows: 1e6 * statistics.median(each) for rows, each in of.items()} for name, of in seconds.items()}


def recalled(head: Head, weight_DH: Tensor, states_NH: Tensor) -> tuple[float, float]:
    """Shares of the exact best child, and of the exact best four, that a head has as its best and among its best four."""
    first = four = 0
    for x_NH in states_NH[:4000].split(100):
        exact, ours = (logits.topk(CHILDREN, -1).indices for logits in (x_NH @ weight_DH.T, head(x_NH)))
        first += int((exact[:, 0] == ours[:, 0]).sum())
        four += int((exact.unsqueeze(2) == ours.unsqueeze(1)).any(2).sum())
    return first / min(4000, len(states_NH)), four / CHILDREN / min(4000, len(states_NH))


def taus(engine: Engine, head: Head, vocab: DraftVocab, prompts: list[str]) -> dict[str, float]:
    drafter = eagle3(engine)
    drafter.network.head, drafter.vocab = head, vocab
    engine.makers["eagle3"] = lambda: drafter
    found = {}
    for tree in TREES:
        results = engine.generate(prompts, method="eagle3", tree=tree, max_new_tokens=200, batch=1)
        rounds = sum(result.rounds for result in results)
        found[tree] = sum(length * times for result in results for length, times in result.accepted_lengths.items()) / rounds
    return found


@torch.inference_mode()
def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("prompts", type=Path)
    options.add_argument("--ranks", default="32,64,128")
    options.add_argument("--limit", type=int, default=20)
    options.add_argument("--out", type=Path)
    given = options.parse_args()
    engine = eyas.load()
    prompts = [item.prompt for item in read_prompts(given.prompts)[0][: given.limit]]
    heads = heads_of(engine, list(map(int, given.ranks.split(","))), states_on(engine, [item.prompt for item in read_prompts(DEV)[0]], 100))
    states_NH = states_on(engine, prompts, 40)
    microseconds = timed(heads, states_NH)
    rows: list[dict[str, Any]] = []
    for name, (head, vocab, weight) in heads.items():
        first, four = recalled(head, weight, states_NH)
        row = {
            "head": name,
            "microseconds": microseconds[name],
            "best_found": first,
            "of_best_four": four,
            "tau": taus(engine, head, vocab, prompts),
        }
        rows.append(row)
        times = " | ".join(f"{microseconds[name][count]:.0f}" for count in ROWS)
        print(
            f"| {name} | {times} | {first:.3f} | {four:.3f} | " + " | ".join(f"{tau:.2f}" for tau in row["tau"].values()) + " |", flush=True
        )
    if given.out:
        given.out.write_text(json.dumps({"rows": rows, "states": len(states_NH), "prompts": len(prompts)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
