"""Whether the tests can fail: put one small fault at a time into a module and run the tests that should see it.

Faults are lines of `mutants.txt` beside this file. A fault lives in memory alone: a child process imports the changed module, the file
stays as it is. torch is imported once, before the children part, so a fault costs what its tests cost.

    python scripts/mutants.py [WORD ...]    # only faults of files or tests that hold one of the words
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import os
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
LIMIT = 240  # seconds; a fault that makes a loop endless is seen too
SURVIVED, KILLED, UNSUITED = 0, 1, 3


class Mutant(NamedTuple):
    file: str
    old: str
    new: str
    tests: list[str]
    why: str  # it is the same program, where it is; else empty

    def __str__(self) -> str:
        return f"{self.file}: {self.old!r} -> {self.new!r}"


def mutants(text: str) -> list[Mutant]:
    """Sections `# FILE | TESTS`, lines `OLD ==> NEW` and, of those that no test can see, ` ## WHY`. `\\n` is a new line."""
    found, file, tests = [], "", []
    for line in text.splitlines():
        if line.startswith("# "):
            file, _, names = line[2:].partition(" | ")
            tests = names.split()
        elif line:
            fault, _, why = line.partition(" ## ")
            old, _, new = (part.replace("\\n", "\n") for part in fault.partition(" ==> "))
            found.append(Mutant(file, old, new, tests, why))
    return found


def plant(mutant: Mutant) -> bool:
    """Let the module be imported with its fault; False where the text is not there exactly once, or what comes of it is no Python."""
    path = str(ROOT / mutant.file)
    source = Path(path).read_text(encoding="utf-8")
    if source.count(mutant.old) != 1:
        return False
    try:
        code = compile(source.replace(mutant.old, mutant.new), path, "exec", dont_inherit=True)
    except SyntaxError:
        return False
    own = importlib.machinery.SourceFileLoader.get_code
    importlib.machinery.SourceFileLoader.get_code = lambda self, name: code if self.path == path else own(self, name)
    return True


def child(mutant: Mutant | None, tests: list[str]) -> int:
    import pytest

    os.chdir(ROOT)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        if mutant and not plant(mutant):
            return UNSUITED
        return SURVIVED if pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests]) == 0 else KILLED


def outcome(mutant: Mutant | None, tests: list[str]) -> str:
    """What the tests say of a fault, or of the source as it is."""
    process = os.fork()
    if process == 0:
        os.setsid()
        status = KILLED
        with contextlib.suppress(BaseException):
            status = child(mutant, tests)
        os._exit(status)
    deadline = time.monotonic() + LIMIT
    while (ended := os.waitpid(process, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return "killed (endless)"
        time.sleep(0.05)
    return {SURVIVED: "survived", KILLED: "killed", UNSUITED: "NOT THERE"}.get(os.waitstatus_to_exitcode(ended[1]), "killed (crash)")


def sound_without(known: dict[tuple[str, ...], bool], tests: tuple[str, ...]) -> bool:
    """Whether these tests pass where there is no fault."""
    if tests not in known:
        known[tests] = outcome(None, list(tests)) == "survived"
    return known[tests]


def main(words: list[str]) -> int:
    for name in ("torch", "pytest", "hypothesis", "transformers.tokenization_utils_fast", "transformers.models.llama.modeling_llama"):
        importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)  # its other threads do not survive a fork
    sys.path.insert(0, str(ROOT))
    listed = mutants((Path(__file__).with_suffix(".txt")).read_text(encoding="utf-8"))
    chosen = [each for each in listed if not words or any(word in " ".join((each.file, *each.tests)) for word in words)]
    survivors = 0
    sound: dict[tuple[str, ...], bool] = {}
    for mutant in chosen:
        key = tuple(mutant.tests)
        if not mutant.why and not sound_without(sound, key):
            print(f"BROKEN    {' '.join(key)} fail without any fault")
            return 2
        if mutant.why:
            print(f"equal     {mutant} ({mutant.why})", flush=True)
            continue
        started = time.monotonic()
        told = outcome(mutant, mutant.tests)
        survivors += not told.startswith("killed")
        print(f"{told:9} {mutant} ({time.monotonic() - started:.0f} s)", flush=True)
    print(f"{len(chosen)} faults, {survivors} not seen")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
