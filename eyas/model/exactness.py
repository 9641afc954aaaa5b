"""Where speculation writes plain decoding's text to the last bit, and where rounding may part the two at near ties.

It does where no row of a pass depends on the pass's other rows. Knows targets; knows nothing of drafts, since no draft can change the text.
"""

from __future__ import annotations

from eyas.model.protocols import TargetModel

CONDITIONS = (  # the README says this sentence, and a test compares the two
    "It is plain decoding's text, token for token and at every precision, for targets on eyas's own blocks on a CPU with the native kernel "
    "(Linux, x86-64 and a C compiler). Elsewhere (on CUDA, without a C compiler, for targets that run through transformers) fp32 texts are "
    "equal and bf16 texts may part at near ties."
)


def why_texts_may_part(target: TargetModel) -> str | None:
    """Why a tree's rows may be rounded in another way than plain decoding's; None where they are the same bits. `target`: prepared."""
    if target.blocks is None:
        return "this target runs through transformers"
    if target.device.type != "cpu":
        return f"passes run on {target.device.type}"
    if not target.rows_stand_alone:
        return "not all of it runs in the native kernel here"
    return None
