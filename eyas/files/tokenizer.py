"""A target's tokenizer, and the hash of its chat template.

Knows a directory; knows nothing of prompts.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from eyas.config import EyasError
from eyas.files.disk import read_json


def chat_template_hash(directory: Path) -> str | None:
    """sha256 of a model's chat template as its files hold it; None where it has none."""
    own = directory / "chat_template.jinja"
    settings = directory / "tokenizer_config.json"
    if own.exists():
        template: Any = own.read_text(encoding="utf-8")
    else:
        template = read_json(settings).get("chat_template") if settings.exists() else None
    return hashlib.sha256(json.dumps(template).encode()).hexdigest() if template else None


def load_tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise EyasError(f"{directory} holds no tokenizer that transformers can read ({str(error).splitlines()[0]})") from None
