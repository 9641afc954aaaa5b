"""What a model's generation_config.json asks of a text: the settings that are followed here, and those that are not done.

Knows the file's fields; knows nothing of models or tokens. End-of-turn ids are read elsewhere (ends.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from eyas.config import EyasError, Request, Sampling
from eyas.files.disk import read_json
from eyas.files.untrusted import Fields

FILE = "generation_config.json"
NUMBERS = ("top_p", "min_p", "repetition_penalty")  # followed as they are; temperature only where the file samples
COUNTS = ("top_k", "max_new_tokens", "min_new_tokens")
NOT_DONE: dict[str, Any] = {  # fields of transformers that change a text and are not done here -> the value that asks for nothing
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "diversity_penalty": 0,
    "dola_layers": None,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "exponential_decay_length_penalty": None,
    "force_words_ids": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1,
    "max_time": None,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "penalty_alpha": None,
    "sequence_bias": None,
    "stop_strings": None,
    "suppress_tokens": None,
    "top_h": None,
    "typical_p": 1,
    "watermarking_config": None,
}


class GenerationConfig(NamedTuple):
    settings: dict[str, Any]  # of `Request` and `Sampling`, by name; those that differ from their defaults
    not_done: dict[str, Any]  # what the file asks for besides and is not done here


def generation_config(directory: Path) -> GenerationConfig:
    """Read a model's generation_config.json. A file that does not sample (`do_sample`) leaves the temperature at 0; a field it lacks is as
    if there were no file (transformers adds a top_k of 50 of its own). Raises `EyasError` for values that cannot be."""
    path = directory / FILE
    if not path.exists():
        return GenerationConfig({}, {})
    try:
        raw = read_json(path)
        found = followed(Fields(raw, path))
        Sampling(**{key: value for key, value in found.items() if key in Sampling.__dataclass_fields__})
    except EyasError as error:
        where = "" if str(path) in str(error) else f"{path}: "
        raise EyasError(f"{where}{error}; mend it, or pass over the file with --generation-config none") from None
    return GenerationConfig(found, {key: raw[key] for key in NOT_DONE if raw.get(key) not in (None, [], {}, NOT_DONE[key])})


def followed(fields: Fields) -> dict[str, Any]:
    """The file's settings that are followed here and differ from the usual ones."""
    found: dict[str, Any] = {key: fields.number(key) for key in NUMBERS}
    found |= {key: fields.size(key) for key in COUNTS if fields.raw.get(key) is not None}
    if fields.flag("do_sample"):
        found["temperature"] = fields.number("temperature", 1.0)
    usual = {**vars(Sampling()), **vars(Request())}
    return {key: value for key, value in found.items() if value is not None and value != usual[key]}
