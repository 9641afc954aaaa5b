"""Writes the tables of docs/models.md from the lists by which targets are read, so that the page says what the code does.

Run: python scripts/model_tables.py      (tests/files/test_models_page.py fails where the page is not what this writes)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from page_tables import code, filled, table

from eyas.files import adaptable, config_fields, gguf, hf_config, quantised, untrusted

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BIASES = {None: "where `attention_bias` says so", True: "always", False: "never"}
STORED = {".safetensors": "all weights", ".json": "the shards that it lists", ".bin": "all weights, as `torch.save` wrote them"}


def words(text: str) -> str:
    """A text with the names of fields as code."""
    return re.sub(r"\b\w+_\w+\b|\bfactor\b", lambda match: f"`{match[0]}`", text)


def values(fields: Mapping[str, tuple[Any, ...]]) -> Iterable[tuple[str, ...]]:
    return ((f"`{name}`", code(at)) for name, at in sorted(fields.items()))


def families() -> Iterable[tuple[str, ...]]:
    for name, family in hf_config.FAMILIES.items():
        behind = BIASES[None] if family.out_bias else BIASES[False]
        yield f"`{name}`", BIASES[family.qkv_bias], behind, "yes" if family.qk_norm else "no"


def quantisations() -> Iterable[tuple[str, ...]]:
    for method, formats in quantised.WIDENED.items():
        yield f"`{method}`", "any" if formats is None else code(formats), "FP8 or int8 weights times their scales, on either way"
    for method in quantised.BY_TRANSFORMERS:
        yield f"`{method}`", "any", "by transformers, for models that run through it"


def tables() -> dict[str, str]:
    rope = {*config_fields.ROPE_READ} | {"rope_parameters", "rope_scaling"}
    return {
        "families": table(("`model_type`", "biases of q, k, v", "bias behind the attention", "norms of queries and keys"), families()),
        "foreign": table(("field", "on our own blocks at"), values(config_fields.KNOWN_AT)),
        "contexts": table(("`rope_type`", "context"), ((f"`{kind}`", words(told)) for kind, told in config_fields.ROPE_KINDS.items())),
        "fields": table(
            ("fields", "are"),
            (
                ("read", code(sorted(config_fields.READ))),
                ("read, of a rotary embedding", code(sorted(rope))),
                ("harmless at any value", code(sorted(config_fields.HARMLESS))),
                ("harmless, of a rotary embedding", code(sorted(config_fields.ROPE_HARMLESS))),
            ),
        ),
        "harmless_at": table(("field", "harmless at"), values(config_fields.HARMLESS_AT)),
        "weights": table(("file", "holds"), ((f"`{name}`", STORED[Path(name).suffix]) for name in untrusted.WEIGHTS)),
        "quantised": table(("method", "formats", "widened"), quantisations()),
        "gguf": table(
            ("fields", "are"),
            (
                ("read", code(gguf.FIELDS)),
                ("harmless", code(gguf.HARMLESS_FIELDS)),
                ("harmless at these values", ", ".join(f"{name}: {at}" for name, at in values(gguf.HARMLESS_FIELDS_AT))),
            ),
        ),
        "refused": table(("what", "said"), adaptable.REFUSED.items()),
    }


def written(page: str) -> str:
    """The page with its tables as they should be."""
    return filled(page, tables())


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
