"""Tests that others wrote for servers like ours, run against `eyas serve`: llama.cpp's own server tests and llm-comply.

    python scripts/foreign_suites.py [--suite llama.cpp] [--suite llm-comply] [--target T --draft D] [--verbose]

Makes an environment for their packages (under the cache, once), unpacks llama.cpp's tests from llama-cpp-python's source distribution,
starts a server for each group of settings and runs there what is generic. Each of their tests is in a group, or left out for a reason that
stands here; one that is neither is an error. Three things of theirs are changed in the copy that runs: what a model must say (theirs is a
tiny one of children's stories), the first letters of a system_fingerprint, and that a header's name has a case. Then comes llm-comply, and
our answers are held against OpenAI's specification, which it carries. Prints a line a group, each failure, and the sums.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from eyas.bench.environments import environment, llama_cpp_sources
from eyas.bench.servers import serving

PACKAGES = (
    (
        "install",
        *("pytest==8.4.2", "openai==3.57.0", "requests==2.32.5", "wget==3.2", "filelock==3.20.0", "prometheus-client==0.26.0"),
        *("llm-comply==0.5.0", "jsonschema==4.25.1"),
    ),
)
FILES = ("chat_completion", "completion", "tokenize", "basic", "security")
CHANGED = (  # in the copy: file, what stands there, what stands there then
    ("utils.py", "def match_regex(regex: str, text: str) -> bool:\n", "def match_regex(regex: str, text: str) -> bool:\n    return True\n"),
    ("utils.py", "result.headers = dict(response.headers)", "result.headers = response.headers"),  # a name there has no case
    ("unit/test_chat_completion.py", '.startswith("b")', '.startswith("fp_")'),
    ("unit/test_completion.py", '.startswith("b")', '.startswith("fp_")'),
)
HERE = Path(__file__).parent
ANY = ("--any-model", "--served-model-name", "llama-test-model")


class Group(NamedTuple):
    """Tests that run against one server; names are patterns behind their file's."""

    options: tuple[str, ...]
    tests: tuple[str, ...]


GROUPS = {
    "as it is": Group(
        ANY,
        (
            "chat_completion::test_chat_completion_stream*",
            "chat_completion::test_chat_completion_with_openai_library",
            "chat_completion::test_chat_completion_with_timings_per_token",
            "chat_completion::test_chat_completions_multiple_choices",
            "chat_completion::test_chat_completions_token_count",
            "chat_completion::test_chat_template_continue_final_message_mutual_exclusion",
            "chat_completion::test_completion_with_grammar*",
            "chat_completion::test_completion_with_invalid_grammar",
            "chat_completion::test_completion_with_json_schema*",
            "chat_completion::test_completion_with_response_format*",
            "chat_completion::test_invalid_chat_completion_req[None]",
            "chat_completion::test_invalid_chat_completion_req[string]",
            *(f"chat_completion::test_invalid_chat_completion_req[messages{number}]" for number in range(2, 7)),
            "chat_completion::test_logit_bias",
            "chat_completion::test_logprobs*",
            "completion::test_completion_with_openai_library",
            "completion::test_completion_stream_with_openai_library",
            "tokenize::test_tokenize_detokenize",
            "tokenize::test_tokenize_with_pieces",
            "basic::test_server_start_simple",
            "security::test_access_public_endpoint*",
            "security::test_local_media_file[None-*",
            "security::test_local_media_file*notfound*",
            "security::test_local_media_file*traversal*",
            "security::test_local_media_file*..*test-1.jpeg-False*",
        ),
    ),
    "--api-key": Group(
        (*ANY, "--api-key", "sk-this-is-the-secret-key"),
        ("security::test_incorrect_api_key*", "security::test_openai_library_correct_api_key"),
    ),
    "--context 256": Group((*ANY, "--context", "256"), ("chat_completion::test_context_size_exceeded*",)),
    "--cors localhost": Group((*ANY, "--cors", "localhost"), ("security::test_cors_origins_localhost_reflects*",)),
}
NATIVE = "llama.cpp's own /completion, which is not served: /v1/completions is"
MODEL = "its own model's template, tokens or files"
EXCLUDED = {  # the first pattern that fits says why
    "chat_completion::test_chat_completion_cached_tokens": MODEL,
    "chat_completion::test_chat_completion[*": MODEL,
    "chat_completion::test_chat_template*": "a template given on its own command line, and __verbose",
    "chat_completion::test_apply_chat_template": "a template given on its own command line",
    "chat_completion::test_invalid_chat_completion_req*": "two answers at the end are refused there; here the template has the say",
    "chat_completion::test_return_progress*": "progress events; ours are comments that say that the stream lives",
    "chat_completion::test_verbose_debug": "__verbose: the whole prompt in the answer",
    "tokenize::test_tokenize_with_bos": "the embedded target's tokenizer begins no text with a token",
    "basic::test_server_multiple_addresses": "starts its own server at two addresses",
    "basic::test_server_props": "/props, where a .gguf is wanted",
    "basic::test_server_models": "two names at once: another test wants another one",
    "basic::test_server_slots": "starts its own server twice",
    "basic::test_no_ui": "starts its own server twice",
    "basic::test_server_model_aliases_and_tags": "aliases and tags on its own command line",
    "basic::test_load_split_model": MODEL,
    "security::test_access_static_assets*": "files of its own page",
    "security::test_correct_api_key*": NATIVE,
    "security::test_cors_options*": "any origin is reflected there, with credentials: any page could then drive a server on loopback",
    "security::test_cors_origins_localhost_rejects*": "a preflight from elsewhere is refused with 400 here; browsers refuse either",
    "security::test_cors_origins_defaults*": "its tools on its own command line",
    "security::test_cors_proxy*": "its proxy for MCP",
    "security::test_local_media_file*": "a folder of pictures on its own command line",
    "completion::*": NATIVE,
}


class Sum(NamedTuple):
    passed: int
    failed: list[str]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", action="append", choices=list(SUITES), help="default: all")
    parser.add_argument("--target")
    parser.add_argument("--draft")
    parser.add_argument("--verbose", action="store_true", help="what the tests themselves say, too")
    given = parser.parse_args()
    models = [word for name in ("target", "draft") if getattr(given, name) for word in (f"--{name}", getattr(given, name))]
    python = environment("foreign_suites", PACKAGES)
    failed = []
    for suite in given.suite or SUITES:
        failed += SUITES[suite](python, models, given.verbose)
    return 1 if failed else 0


# ---- llama.cpp ----


def llama_cpp(python: Path, models: Sequence[str], verbose: bool) -> list[str]:
    """Run what is generic of llama.cpp's server tests; the names of those that failed."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "tests"
        shutil.copytree(llama_cpp_sources() / "tools" / "server" / "tests", place)
        for name, before, after in CHANGED:
            text = (place / name).read_text()
            assert before in text, f"{name} is not what it was: {before!r} is gone"
            (place / name).write_text(text.replace(before, after))
        groups, left_out, unknown = sorted_out(collected(python, place))
        for test in unknown:
            print(f"  in no group, and left out for no reason: {test}")
        passed, failed = 0, list(unknown)
        for name, tests in groups.items():
            found = run(python, place, [*models, *GROUPS[name].options], tests, verbose)
            print(f"llama.cpp, {name}: {found.passed} of {len(tests)} passed", flush=True)
            for test in found.failed:
                print(f"  failed: {test}")
            passed, failed = passed + found.passed, failed + found.failed
    ran = sum(map(len, groups.values()))
    print(f"llama.cpp: {passed} of {ran} passed, {sum(left_out.values())} left out:")
    for why, count in left_out.most_common():
        print(f"  {count:3} {why}")
    return failed


def collected(python: Path, place: Path) -> list[str]:
    """All tests that are not slow, as file::name[parameters]."""
    files = [f"unit/test_{name}.py" for name in FILES]
    said = subprocess.run(
        [python, "-m", "pytest", "-q", "--collect-only", "-m", "not slow", *files], cwd=place, capture_output=True, text=True, check=True
    )
    return [line.removeprefix("unit/test_").replace(".py::", "::", 1) for line in said.stdout.splitlines() if "::" in line]


def sorted_out(tests: Sequence[str]) -> tuple[dict[str, list[str]], Counter[str], list[str]]:
    """The tests of each group, how many are left out by reason, and those that are neither."""
    groups: dict[str, list[str]] = {name: [] for name in GROUPS}
    left_out, unknown = Counter[str](), list[str]()
    for test in tests:
        group = next((name for name, group in GROUPS.items() if any(fits(test, pattern) for pattern in group.tests)), None)
        why = next((why for pattern, why in EXCLUDED.items() if fits(test, pattern)), None)
        if group is not None:
            groups[group].append(test)
        elif why is not None:
            left_out[why] += 1
        else:
            unknown.append(test)
    return groups, left_out, unknown


def fits(test: str, pattern: str) -> bool:
    """Whether a pattern, with * for anything, is a test's name."""
    return fnmatch(test, pattern.replace("[", "[[]"))


def run(python: Path, place: Path, options: Sequence[str], tests: Sequence[str], verbose: bool) -> Sum:
    """Run some tests against a server with these options."""
    names = [f"unit/test_{test.replace('::', '.py::', 1)}" for test in tests]
    with serving(*options) as address:
        environ = os.environ | {"DEBUG_EXTERNAL": "1", "PORT": address.rsplit(":", 1)[1]}
        command = [python, "-m", "pytest", "-q", "-rf", "--tb=short", "-p", "no:cacheprovider", *names]
        said = subprocess.run(command, cwd=place, capture_output=True, text=True, env=environ)
    if verbose or said.returncode > 1:
        print(said.stdout, said.stderr)
    failed = [line.split(" ", 1)[1] for line in said.stdout.splitlines() if line.startswith("FAILED ")]
    told = re.search(r"(\d+) passed", said.stdout)
    return Sum(int(told[1]) if told else 0, failed)


# ---- llm-comply ----

CHECKS = ("basic-response", "system-prompt", "multi-turn", "streaming-response", "streaming-usage")
NOT_CHECKED = {
    "image-input": "pictures are not served",
    "error-handling": "wants 400 for a body without model; llama.cpp's tests send none",
    "tool-calling": "its schema lets strings grow without end, and a small model writes on to the end of the context",
    "reasoning-summary": "it leaves it out by itself",
}


def llm_comply(python: Path, models: Sequence[str], verbose: bool) -> list[str]:
    """Run llm-comply on chat completions, and hold our answers against the specification that it carries; what failed."""
    with serving(*models, *ANY) as address:
        names = ",".join(f"chat-{name}" for name in CHECKS)
        command = [python.with_name("llm-comply"), "--format", "openai-chat", "-u", f"{address}/v1", "-k", "none", "--json", "-f", names]
        checks = subprocess.run(command, capture_output=True, text=True)
        answers = subprocess.run([python, HERE / "openai_spec.py", address], capture_output=True, text=True)
    if verbose or checks.returncode > 1 or answers.returncode:
        print(checks.stdout, checks.stderr, answers.stdout, answers.stderr)
    told = json.loads(checks.stdout)
    failed = [f"{each['id']}: {'; '.join(each.get('errors', []))[:300]}" for each in told["results"] if each["status"] != "passed"]
    lines = answers.stdout.splitlines()
    wrong = [line.removeprefix("FAILED ") for line in lines if not line.startswith("ok ")]
    print(f"llm-comply: {told['summary']['passed']} of {len(CHECKS)} passed, {len(NOT_CHECKED)} left out:")
    for name, why in NOT_CHECKED.items():
        print(f"  {name}: {why}")
    print(f"OpenAI's specification: {len(lines) - len(wrong)} of {len(lines)} answers fit")
    for each in (*failed, *wrong):
        print(f"  failed: {each}")
    return [*failed, *wrong, *([] if lines and not answers.returncode else ["the answers were not held against the specification"])]


SUITES = {"llama.cpp": llama_cpp, "llm-comply": llm_comply}

if __name__ == "__main__":
    sys.exit(main())
