"""Writes very many conversations at once on a GPU, in steps of fixed shapes that CUDA replays as one graph.

Every slot reads one token a step: first those that are given (template, question), then those that it draws. A stretch of steps runs
without the host, which then goes through what was drawn by the rules of dialogue.py; where a rule says otherwise than the device went on,
the next stretch begins at that place again, and the rows beyond are written anew. Two lanes of slots take turns, so that the host follows
one while the device writes the other. What is handed over is tokens alone: their states are a prefill away, many times as fast as writing.
Draws are keyed as in selfplay.py; products of other shapes round otherwise, so a text is that one's where no draw is near a tie. On a CPU
the same steps run one by one, for tests. Knows the target's layers and dialogues; knows nothing of files or drafts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from eyas.decode.philox import uniforms_on
from eyas.kernels.attention import Attend, flashes
from eyas.kernels.captured import Graph
from eyas.model.protocols import TargetModel
from eyas.model.target import Target
from eyas.train.dialogue import Conversation, Dialogues, Flight, asked_with, drawn
from eyas.train.questions import Asked, SelfPlay
from eyas.train.template import Template

STRETCH = 16  # steps that run without the host; it learns that a question or an answer ended half of these late
LANES = 2
FREE = -1  # in the place of a given token: what is drawn goes on


def fits(target: TargetModel) -> bool:
    """Whether a target can be run in these steps: one of our own layers, which sees all of a conversation."""
    return isinstance(target, Target) and target.config.sliding_window is None


class SlotAttention:
    """Attention of one row for each of B slots over the slot's own keys, of which the first `positions_B` + 1 are there."""

    def __init__(self, keys: Tensor, values: Tensor, positions_B: Tensor) -> None:
        """`keys`, `values` [layers, B, T, k, d]"""
        self.keys, self.values, self.positions = keys, values, positions_B
        _, B, T, _, _ = keys.shape
        self.slots = torch.arange(B, device=keys.device)
        self.starts = torch.arange(B + 1, device=keys.device, dtype=torch.int32)
        self.lengths = (positions_B + 1).int()
        self.seen = (torch.arange(T, device=keys.device) <= positions_B[:, None])[:, None, None]

    def layer(self, layer: int) -> Attend:
        keys, values = self.keys[layer], self.values[layer]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys[self.slots, self.positions] = k
            values[self.slots, self.positions] = v
            return (self.flash if q.is_cuda and flashes(q) else self.plain)(q, keys, values)

        return attend

    def plain(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """[B, q * d], reading all keys."""
        grouped = q.unflatten(1, (keys.shape[2], -1))
        out = F.scaled_dot_product_attention(grouped, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=self.seen)
        return out.flatten(1)

    def flash(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The same by a kernel that reads of each slot only the keys that are there. The query heads of a key head are rows to it."""
        B, T, kv_heads, d = keys.shape
        group = q.shape[1] // kv_heads
        rows = q.unflatten(1, (kv_heads, group)).transpose(1, 2).reshape(B * group, kv_heads, d)
        out = torch.ops.aten._flash_attention_forward(
            rows,
            keys.flatten(0, 1),
            values.flatten(0, 1),
            self.starts * group,
            self.starts * T,
            group,
            T,
            0.0,
            False,
            False,
            scale=d**-0.5,
            seqused_k=self.lengths,
        )[0]
        return out.unflatten(0, (B, group)).transpose(1, 2).reshape(B, -1)


class Plan(NamedTuple):
    """What a lane's B slots do in a stretch of S steps, on the host."""

    whole: Tensor  # [3 + S, B] int64: the token read first, its position, the seed; then the token to be read after each step, or FREE
    real: Tensor  # [2, B] float32: temperature, top-p

    def pinned(self) -> Plan:
        """Where a copy to the device starts without waiting for what is under way there."""
        return Plan(*(each.pin_memory() for each in self))


class Lane:
    """B slots that are stepped together."""

    def __init__(self, target: Target, slots: int, capacity: int, candidates: int) -> None:
        config, device = target.config, target.device
        self.target, self.capacity, self.candidates = target, capacity, candidates
        shape = (config.num_hidden_layers, slots, capacity, config.num_key_value_heads, config.head_dim)
        self.keys, self.values = (torch.zeros(shape, dtype=target.dtype, device=device) for _ in range(2))
        self.plan = Plan(torch.zeros(3 + STRETCH, slots, dtype=torch.int64, device=device), torch.ones(2, slots, device=device))
        self.u = torch.zeros(STRETCH, slots, device=device)  # uniform numbers of the draws
        self.number = torch.zeros(1, dtype=torch.int64, device=device)  # of the step in its stretch
        self.followed = torch.zeros(STRETCH, slots, dtype=torch.int64, device=device)  # after each step the token that is read next
        self.graph = Graph(self.step, [*self.plan, self.u, self.number, self.followed])
        self.found = torch.zeros(STRETCH, slots, dtype=torch.int64, pin_memory=device.type == "cuda")
        self.done = torch.cuda.Event() if device.type == "cuda" else None

    def step(self, *_inputs: Tensor) -> tuple[Tensor | None, ...]:
        """Each slot reads a token, and learns the next one."""
        (tokens, positions, _), given, (temperature, top_p) = self.plan.whole[:3], self.plan.whole[3:], self.plan.real
        hidden, _ = self.target.states(tokens, positions, SlotAttention(self.keys, self.values, positions), ())
        row = self.number.clamp_max(STRETCH - 1)  # where a graph is made it runs more often than a stretch has steps
        chosen = drawn(self.target.head(hidden), temperature, top_p, self.u.index_select(0, row)[0], self.candidates)
        wanted = given.index_select(0, row)[0]
        following = torch.where(wanted == FREE, chosen, wanted)
        self.followed.index_copy_(0, row, following[None])
        tokens.copy_(following)
        positions.add_(1).clamp_max_(self.capacity - 1)
        self.number.add_(1)
        return ()

    @torch.inference_mode()
    def launch(self, plan: Plan) -> None:
        """Begin a stretch; on CUDA this does not wait for its end."""
        for held, new in zip(self.plan, plan.pinned() if self.done else plan, strict=True):
            held.copy_(new, non_blocking=True)
        _, positions, seeds = self.plan.whole[:3]
        known = positions + torch.arange(1, STRETCH + 1, device=positions.device)[:, None]  # tokens before each draw
        self.u.copy_(uniforms_on(seeds.expand(STRETCH, -1).flatten(), known.flatten(), 1).view(STRETCH, -1))
        self.number.zero_()
        for _ in range(STRETCH):
            self.graph()
        self.found.copy_(self.followed, non_blocking=True)
        if self.done:
            self.done.record()

    def collect(self) -> list[list[int]]:
        """For each slot the tokens that followed each step of the stretch, once it has ended."""
        if self.done:
            self.done.synchronize()
        return self.found.T.tolist()


class FixedWriter:
    """Keeps `slots` conversations in flight. `target` is prepared, and `fits`."""

    @torch.inference_mode()
    def __init__(self, target: TargetModel, template: Template, settings: SelfPlay, given: Sequence[Asked], slots: int) -> None:
        self.target, self.settings = cast("Target", target), settings
        capacity = min(settings.longest, target.config.max_position_embeddings)
        self.dialogues = Dialogues(template, settings, given, capacity)
        self.size = -(-slots // LANES)
        self.lanes = [Lane(self.target, self.size, capacity, settings.candidates) for _ in range(LANES)]

    def write(self, indices: Iterator[int]) -> Iterator[tuple[int, Conversation | None]]:
        """Write the conversations of these indices, and yield (index, conversation) as each ends; None for a conversation whose answers are
        too short. Of a shard's indices none may be left out: a conversation may ask about the text of the one before it."""
        runs = self.dialogues.runs(indices)
        working = [(lane, Flight(self.dialogues, runs, self.size)) for lane in self.lanes]
        working = [(lane, flight) for lane, flight in working if flight.rows]
        for lane, flight in working:
            lane.launch(self.planned(flight.rows))
        while working:
            lane, flight = working.pop(0)
            tokens = lane.collect()
            ended = [(slot, row) for slot, row in flight.rows.items() if self.follow(row, tokens[slot])]
            for slot, row in ended:
                kept = row if self.dialogues.finish(row) else None
                yield row.index, kept
                flight.follow(slot, kept)
            if flight.rows:
                lane.launch(self.planned(flight.rows))
                working.append((lane, flight))

    def follow(self, row: Conversation, tokens: Sequence[int]) -> bool:
        """Go through what a stretch gave: after each step the token that follows. Says whether the conversation is over; what waits for it
        then is what the next stretch begins with."""
        given = len(row.waiting) - 1
        if given >= len(tokens):  # all of the stretch went into reading what was given
            row.tokens += row.waiting[: len(tokens)]
            row.waiting, row.read = row.waiting[len(tokens) :], len(row.tokens)
            return False
        asking = row.asking
        for token in tokens[given:]:
            if self.dialogues.go_on(row, token):
                return True
            if row.waiting != [token] or row.asking != asking:
                return False  # the device drew on, and as before, where something is to be read
        return False

    def planned(self, rows: dict[int, Conversation]) -> Plan:
        """What these slots do in the next stretch; the others run idle."""
        whole, real = torch.zeros(3 + STRETCH, self.size, dtype=torch.int64), torch.ones(2, self.size)
        whole[3:] = FREE
        following = [[FREE] * STRETCH for _ in rows]
        for each, row in zip(following, rows.values(), strict=True):
            known = row.waiting[1 : STRETCH + 1]
            each[: len(known)] = known
        slots = torch.tensor(list(rows))
        begun = [(row.waiting[0], row.read, row.start.seed) for row in rows.values()]
        whole[:, slots] = torch.cat([torch.tensor(begun), torch.tensor(following)], 1).T
        real[:, slots] = torch.tensor(asked_with(self.settings, list(rows.values())))
        return Plan(whole, real)
