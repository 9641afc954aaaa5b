"""Sends `eyas serve` what schemathesis makes of its /openapi.json: no 5xx, answers as declared, no hang.

Run: python scripts/fuzz_server.py [--calls 10000] [--minutes 40] [--schemathesis EXECUTABLE] [--seed 1] (pip install schemathesis, >= 4.32)

The server has a tiny random model and few tokens of context, so that most calls are quick. Needs a checkout, for the model is the tests'.
`--minutes` is a time that is spent whole: what the calls leave of it goes into more of them.
Ends with schemathesis' own report and status, and 1 where the server then does not answer, or said something that it should not.
"""

from __future__ import annotations

import argparse
import http.client
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.tiny import save_tiny_draft, save_tiny_target

ADDRESS = re.compile(r"http://([\d.]+):(\d+)/v1")
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,unsupported_method"
TAKING = 6  # operations that take something; the others are called a few times whatever is asked
TROUBLE = re.compile(r"Traceback|Task was destroyed|never retrieved|never awaited|Exception|Error")
SECONDS = 60  # for a call


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, help="spend this time, with more calls where it is left (default: no bound)")
    parser.add_argument("--schemathesis", default="schemathesis", help="its executable")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        target = save_tiny_target(Path(folder) / "target", max_position_embeddings=256)
        draft = save_tiny_draft(Path(folder) / "draft", target)
        command = [
            sys.executable,
            "-m",
            "eyas",
            "serve",
            "--target",
            str(target),
            "--draft",
            str(draft),
            "--precision",
            "fp32",
            "--port",
            "0",
        ]
        with subprocess.Popen([*command, "--context", "96"], stderr=subprocess.PIPE, text=True) as server:
            assert server.stderr is not None
            said = iter(server.stderr.readline, "")
            address = next(found for line in said if (found := ADDRESS.search(line)))
            log = list[str]()
            reader = threading.Thread(target=log.extend, args=(said,))
            reader.start()
            try:
                status = fuzzed(f"http://{address[1]}:{address[2]}/openapi.json", given)
                alive = answers(address[1], int(address[2]))
            finally:
                server.terminate()
                server.wait(60)
                reader.join()
    trouble = [line for line in log if TROUBLE.search(line)]
    print(f"the server answers: {alive}; in its log is {''.join(trouble) or 'no trouble'}")
    return status or int(bool(trouble) or not alive)


def fuzzed(url: str, given: argparse.Namespace) -> int:
    each = max(given.calls // TAKING, 1)
    words = ["run", url, "--checks", CHECKS, "--max-examples", str(each), "--seed", str(given.seed), "--request-timeout", str(SECONDS)]
    words += ["--max-time", str(round(60 * given.minutes))] if given.minutes else []
    return subprocess.run(
        [given.schemathesis, *words, "--workers", "4", "--continue-on-failure", "--generation-database", "none"], check=False
    ).returncode


def answers(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection(host, port, timeout=SECONDS)
    connection.request("GET", "/health")
    found = connection.getresponse().status == 200
    connection.close()
    return found


if __name__ == "__main__":
    sys.exit(main())
