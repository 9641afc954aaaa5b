"""A decoder that stays between the turns of a conversation, so that a turn costs its new tokens alone.

Where a row's bits do not depend on the pass that read it, rows of what was said before are taken as they are, and no text changes by it.
Knows the decoder and the length of texts; knows nothing of prompts.
"""

from __future__ import annotations

from collections.abc import Iterator

from eyas.decode.generate import Decoder
from eyas.decode.sequence import Sequence

LEAST_ROOM = 8192  # tokens that there is room for at least, where the target reads as many; rows that are not written cost nothing


class Kept:
    """What a conversation keeps of its last turn."""

    def __init__(self) -> None:
        self.decoder: Decoder | None = None  # None: nothing is kept
        self.room = 0  # tokens of the longest text that it has room for

    def run(self, decoder: Decoder, sequence: Sequence) -> Iterator[list[Sequence]]:
        """Decode one sequence as `Decoder.run_all` does. `decoder`: the one that is kept, or a new one. Nothing is kept of a turn that is
        broken off: it may have ended in the middle of a pass."""
        room, self.decoder, self.room = self.room, None, 0
        if sequence.limit > room:
            room = min(max(2 * sequence.limit, LEAST_ROOM), decoder.target.config.max_position_embeddings)
            decoder.reserve(1, room, {sequence.shape}, keep_prefixes=decoder.target.rows_stand_alone)
        yield from decoder.go_on([sequence])
        self.decoder, self.room = decoder, room
