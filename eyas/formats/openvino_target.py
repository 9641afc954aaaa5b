"""A target in OpenVINO's form, once a precision: run by the Python that has OpenVINO's exporter; imports nothing of eyas.

    ENVIRONMENT/bin/python -I openvino_target.py TARGET_DIR fp32|fp16|int8 FOLDER

prints the directory that it wrote in FOLDER, or had written before from the same files.
"""

# What it imports is that environment's, and `openvino` not the module beside this one, as a checker here would think.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path


def converted(target: Path, precision: str, place: Path) -> Path:
    files = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(target.iterdir())]
    key = hashlib.sha256(json.dumps([str(target), files, precision]).encode()).hexdigest()[:10]
    out = place / f"target-{precision}-{key}"
    if not (out / "complete").exists():
        convert(target, precision, out)
        (out / "complete").touch()
    return out


def convert(target: Path, precision: str, out: Path) -> None:
    import nncf
    import openvino
    import torch
    from optimum.exporters.openvino.convert import export_from_model, export_tokenizer
    from optimum.intel import OVConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    task = "text-generation-with-past"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32), AutoTokenizer.from_pretrained(target)
    # float32 first in every case: the exporter would store a bfloat16 checkpoint as it is
    export_from_model(model, out, task, OVConfig(dtype="fp32"), preprocessors=[tokenizer])
    export_tokenizer(tokenizer, out, task=task)
    if precision == "fp32":
        return
    stored = openvino.Core().read_model(out / "openvino_model.xml")
    if precision == "int8":
        stored = nncf.compress_weights(stored, mode=nncf.CompressWeightsMode.INT8_ASYM)
    openvino.save_model(stored, out / "new.xml", compress_to_fp16=precision == "fp16")
    del stored  # it has openvino_model.bin mapped
    for ending in ("bin", "xml"):
        (out / f"new.{ending}").replace(out / f"openvino_model.{ending}")


if __name__ == "__main__":
    print(converted(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])))
