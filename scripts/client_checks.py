"""Client libraries of OpenAI's API against `eyas serve`, each in an environment of its own: what works is printed, claim by claim.

    python scripts/client_checks.py [--client openai ..] [--target T --draft D]

Environments are made under the cache on first use (pip, and npm for Node). Two servers run: one as it is, and one with a single slot and no
queue, which refuses with 429 what it has no room for. Exits with 1 where a claim failed. What is claimed stands in client_calls.py and
client_calls.mjs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from eyas.bench.environments import environment, run, workplace
from eyas.bench.servers import serving

HERE = Path(__file__).parent
PACKAGES = {
    "openai": ("openai==3.57.0",),
    "openai-old": ("openai==2.14.0",),
    "litellm": ("litellm==1.110.2",),
    "langchain-openai": ("langchain-openai==1.7.4",),
    "llm": ("llm==0.36",),
    "instructor": ("instructor==1.17.0",),
}
NODE = "openai-node"
NODE_PACKAGE = "openai@7.55.0"
OFFLINE = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "OPENAI_API_KEY": "none"}  # litellm would fetch prices; some clients want a key to start


def node() -> Path:
    """A folder with OpenAI's package for Node, and the calls beside it."""
    place = workplace("clients") / NODE_PACKAGE.replace("@", "-")
    place.mkdir(parents=True, exist_ok=True)
    if not (place / "node_modules" / "openai").exists():
        run(["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", place, NODE_PACKAGE])
    shutil.copy(HERE / "client_calls.mjs", place)
    return place


def checked(name: str, address: str, busy: str) -> bool:
    """Run one client's claims and print what it says; whether all hold."""
    if name == NODE:
        place = node()
        command: Sequence[str | Path] = ["node", "client_calls.mjs", address, busy]
    else:
        place, python = HERE, environment(f"clients-{name}", [("install", *PACKAGES[name])])
        command = [python, "client_calls.py", name, address, busy]
    said = subprocess.run(command, cwd=place, capture_output=True, text=True, env=os.environ | OFFLINE, timeout=600)
    lines = [line for line in said.stdout.splitlines() if line.startswith(("version ", "ok ", "FAILED "))]  # libraries may say more
    version, claims = lines[0].removeprefix("version ") if lines else "?", lines[1:]
    held = sum(line.startswith("ok ") for line in claims)
    good = said.returncode == 0 and 0 < held == len(claims)
    print(f"{name} {version}: {held} of {len(claims)} claims", flush=True)
    for line in claims:
        print(f"  {line}")
    if said.returncode:
        print(f"  ended with {said.returncode}: {said.stderr.strip()[-600:]}")
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--client", action="append", choices=[*PACKAGES, NODE], help="default: all")
    parser.add_argument("--target")
    parser.add_argument("--draft")
    given = parser.parse_args()
    models = [word for name in ("target", "draft") if getattr(given, name) for word in (f"--{name}", getattr(given, name))]
    models += ["--served-model-name", "eyas"]
    with serving(*models) as address, serving(*models, "--slots", "1", "--queue", "0") as busy:
        found = [checked(name, address, busy) for name in given.client or [*PACKAGES, NODE]]
    return 0 if all(found) else 1


if __name__ == "__main__":
    sys.exit(main())
