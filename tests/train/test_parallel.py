"""Processes that train together part cleanly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, sys, torch
from pathlib import Path
from eyas.train.parallel import Ranks

ranks = Ranks.join()
torch.optim.AdamW([torch.ones(1, requires_grad=True)])  # imports much of torch
import torch._dynamo
value = torch.ones(3)
ranks.sum([value])
shared = torch.full((2,), 7.0 + ranks.rank)
ranks.share([shared])
ranks.wait()
ranks.leave()
threads = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
said = f"{value.tolist()} {shared.tolist()} {[name for name in threads if 'gloo' in name]}"
Path(sys.argv[1], os.environ["RANK"]).write_text(said)  # a file each: what two processes print may mix
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted where Linux tells them")
def test_no_thread_of_the_group_outlives_it(tmp_path):
    """One that does may abort the process at its end: it asks for the interpreter when there is none any more."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python", "--nproc-per-node", "2"]
    words = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run([*launch, *words], capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["[2.0, 2.0, 2.0] [7.0, 7.0] []"] * 2
