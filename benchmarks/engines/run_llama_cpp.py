"""A draft in llama.cpp's llama-server (spec type draft-eagle3): each round beside ours.

    python benchmarks/engines/run_llama_cpp.py --prompts F.jsonl [--precision fp32|bf16|q4_1]

Builds llama-server once from the sources that llama-cpp-python carries (wants a C++ compiler; cmake and ninja come from pip). The target
becomes a GGUF by llama.cpp's own converter, which runs in eyas's Python with one package more. `q4_1` is the embedded target as it was
published, before eyas made bfloat16 of it: llama.cpp then multiplies 8-bit activations, which ours does not. Chains only.

Knows sources, build and files; what the server is asked, and how its log is read, is llama_cpp_child.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from common import HERE, Job, compare, environment, exported, make_job, options, report, run_child, workplace

SOURCES = "llama-cpp-python==0.3.36"  # its vendor/llama.cpp is commit 0c1e570
TOOLS = (("install", "cmake==4.4.5", "ninja==1.13.2", "sentencepiece==0.2.3"),)  # the converter imports the last for any tokenizer
FLAGS = ("LLAMA_CURL=OFF", "LLAMA_OPENSSL=OFF", "LLAMA_BUILD_TESTS=OFF", "LLAMA_BUILD_UI=OFF", "BUILD_SHARED_LIBS=ON", "GGML_NATIVE=ON")
JOBS = 2  # compilers at once
WEIGHTS = {"fp32": "fp32", "bf16": "bf16", "q4_1": "bf16"}  # of the draft; products with a bfloat16 matrix take bfloat16 activations
OUTTYPES = {"fp32": "f32", "bf16": "bf16"}  # of the converted target


def main() -> None:
    parser = options(__doc__, tuple(WEIGHTS))
    chosen = parser.parse_args()
    if chosen.precision == "q4_1" and chosen.target:
        parser.error("q4_1 is the embedded target's published file; leave --target out")
    place = workplace("llama_cpp")
    tools = environment("llama_cpp", TOOLS)
    sources = built(place, tools)
    job = make_job(chosen, exported(chosen.draft, chosen.target, "llama_cpp", place, "--weights", WEIGHTS[chosen.precision]))
    if job.tree[2] != 1:
        parser.error(f"llama.cpp drafts chains only, not {chosen.tree}")
    target = published(place) if chosen.precision == "q4_1" else converted(sources, tools, job, place)
    files = {"LLAMA_SERVER": str(sources / "build/bin/llama-server"), "TARGET_GGUF": str(target)}
    result = run_child(Path(sys.executable), HERE / "llama_cpp_child.py", job, place, **files)
    ours = job
    if chosen.precision == "q4_1":
        ours = replace(job, precision="fp32")
        result["notes"].append("ours: fp32, with a bfloat16 copy of the 4-bit weights; not the same target, so not a fair equality")
    report("llama_cpp", chosen, job, result, compare(ours, result, chosen.draft))


def run(command: Sequence[str | Path], **environ: str) -> None:
    """Stops here with the command's own words on standard error, where it fails."""
    subprocess.run([str(part) for part in command], check=True, stdout=sys.stderr, env=os.environ | environ)


def built(place: Path, tools: Path) -> Path:
    """llama.cpp's sources with llama-server built in them."""
    name, version = SOURCES.split("==")
    folder = place / f"{name.replace('-', '_')}-{version}"
    sources, done = folder / "vendor" / "llama.cpp", folder / "complete"
    if not done.exists():
        run([tools, "-m", "pip", "-q", "download", "--no-binary", ":all:", "--no-deps", "--dest", place, SOURCES])
        run(["tar", "-xzf", f"{folder}.tar.gz", "-C", place])
        cmake, ninja = tools.with_name("cmake"), tools.with_name("ninja")
        build = ["-S", sources, "-B", sources / "build", "-DCMAKE_BUILD_TYPE=Release", *(f"-D{flag}" for flag in FLAGS)]
        run([cmake, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", *build])
        run([ninja, "-C", sources / "build", "-j", str(JOBS), "llama-server"])
        done.touch()
    return sources


def converted(sources: Path, tools: Path, job: Job, place: Path) -> Path:
    """The target as a GGUF, made anew: seconds, and no file can be that of another target."""
    out = place / f"target-{job.precision}.gguf"
    packages = next(tools.parents[1].glob("lib/python*/site-packages"))
    command = [sys.executable, sources / "convert_hf_to_gguf.py", job.target, "--outtype", OUTTYPES[job.precision], "--outfile", out]
    run(command, PYTHONPATH=str(packages))
    return out


def published(place: Path) -> Path:
    from eyas.model.embedded import GGUF, fetch_gguf

    return place / GGUF if (place / GGUF).exists() else fetch_gguf(place)


if __name__ == "__main__":
    main()
