"""What a server is set to and what its slots do, under llama.cpp's names where it has some: /props and /slots.

Knows the engine, the scheduler and the table of fields; knows nothing of HTTP. Both are read while the scheduler's thread goes on, so a
slot may have moved on by the time it is told.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import eyas
from eyas.decode.sequence import tau_of
from eyas.serve.fields import FIELDS

if TYPE_CHECKING:
    from eyas.decode.sequence import Sequence
    from eyas.engine import Engine
    from eyas.serve.jobs import Usual
    from eyas.serve.scheduler import Scheduler

IDLE, READING, DECODING = "idle", "reading", "decoding"


def settings_told(engine: Engine, scheduler: Scheduler, usual: Usual, name: str, fingerprint: str) -> dict[str, Any]:
    """What does not change while a server runs. `name`: the model's first one."""
    settings, template = scheduler.settings, getattr(engine.tokenizer, "chat_template", None)
    defaults = {field.name: field.default for field in FIELDS if field.default not in (None, ())}
    return {
        "default_generation_settings": {"n_ctx": settings.context, "params": defaults},
        "total_slots": settings.slots,
        "model_path": engine.directory.name,
        "model_alias": name,
        "chat_template": template if isinstance(template, str) else "",
        "modalities": {"vision": False, "audio": False},
        "build_info": f"eyas {eyas.__version__}",
        "eyas": {
            "method": usual.method,
            "tree": usual.tree,
            "draft": engine.draft.name if engine.draft else None,
            "precision": engine.precision,
            "device": str(engine.target.device),
            "queue": settings.queue,
            "keeps_prefixes": settings.keep_prefixes,
            "stall_seconds": settings.stall,
            "system_fingerprint": fingerprint,
        },
    }


def slots_told(scheduler: Scheduler, speculative: bool, may_name: Callable[[Sequence], bool]) -> list[dict[str, Any]]:
    """What each slot does. `speculative`: whether the server guesses; `may_name`: whether a text's request may be named to who asks, for
    who knows its name may watch it."""
    decoder, context = scheduler.decoder, scheduler.settings.context
    held = {each.slot: (each, DECODING) for each in decoder.decoding} | {each.slot: (each, READING) for each in list(decoder.reading)}
    return [slot_told(slot, context, speculative, held.get(slot), may_name) for slot in range(decoder.slots)]


def slot_told(
    slot: int, context: int, speculative: bool, held: tuple[Sequence, str] | None, may_name: Callable[[Sequence], bool]
) -> dict[str, Any]:
    told: dict[str, Any] = {"id": slot, "n_ctx": context, "speculative": speculative, "is_processing": held is not None}
    if held is None:
        return told | {"eyas": {"state": IDLE}}
    sequence, state = held
    written = len(sequence.tokens) - sequence.prompt_length
    own = {
        "state": state,
        "request": sequence.call if may_name(sequence) else None,
        "choice": sequence.number,
        "prompt_tokens": sequence.prompt_length,
        "read": sequence.read,
        "reused": sequence.reused,
        "written": written,
        "rounds": sequence.rounds,
        "tau": round(tau_of(sequence), 4),
    }
    return told | {"next_token": {"has_next_token": True, "n_remain": sequence.remaining, "n_decoded": written}, "eyas": own}
