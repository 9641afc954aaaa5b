"""A text's keys shared out on CUDA devices: captured passes, and several processes. Run where there is a device."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import distributed
from torch.testing import assert_close

from eyas.engine import load
from eyas.kernels.attention import attention_with_lse, parted_attention
from eyas.kernels.captured import Graph
from eyas.parallel.layout import Layout
from eyas.parallel.peers import Peers
from eyas.parallel.target import ShardedTarget
from tests.parallel.processes import free_port
from tests.parallel.test_together import idle_slabs, passes
from tests.tiny import save_tiny_draft, save_tiny_target, tiny_target

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
PROMPT = "Tell me of hawks, and of what they eat."
CALLS = [
    {"method": "plain"},
    {"method": "eagle3", "tree": "12x3x4"},
    {"method": "eagle3", "tree": "60x7x10", "temperature": 1.0},
    {"method": "eagle3+copy"},
    {"method": "draft-model", "tree": "chain:3", "temperature": 1.0},
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    save_tiny_target(folder / "target", max_position_embeddings=2048)
    save_tiny_draft(folder / "draft", folder / "target")
    return folder


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float64, 1e-12)]
)
@pytest.mark.parametrize("heads", [(32, 8, 128), (4, 2, 8), (6, 2, 12)])
def test_kernels_of_the_card_are_their_plain_twin(dtype, tolerance, heads):
    (query_heads, kv_heads, width), rows, keys = heads, 9, 2048
    torch.backends.cuda.matmul.allow_tf32 = False
    draw = torch.Generator("cuda").manual_seed(1)
    q, k, v = (
        torch.randn(*shape, width, generator=draw, device="cuda", dtype=torch.float64).to(dtype)
        for shape in ((rows, query_heads), (kv_heads, keys + 512), (kv_heads, keys + 512))
    )
    k, v, hidden = k[:, :keys], v[:, :keys], torch.arange(keys, device="cuda") % 512 >= 500
    bias = torch.zeros(keys, dtype=dtype, device="cuda").masked_fill(hidden, float("-inf"))
    for parts in (1, 4):
        for given in (None, bias):
            out, lse = parted_attention(q, k, v, given, parts)
            for part in range(parts):
                of_part = slice(part * keys // parts, (part + 1) * keys // parts)
                seen = None if given is None else ~hidden[of_part].expand(rows, -1)
                wanted, logs = attention_with_lse(q.double(), k[:, of_part].double(), v[:, of_part].double(), seen)
                assert_close(out[part].double(), wanted.view_as(q), rtol=tolerance, atol=tolerance)
                assert_close(lse[part].double(), logs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_captured_passes_over_shards_are_those_without(dtype):
    target = tiny_target(dtype=dtype, prepare=False).to("cuda").prepare()
    model, plain = ShardedTarget(target, Layout(), Peers(), together=True), tiny_target(dtype=dtype, prepare=False).to("cuda").prepare()
    tolerance = 1e-10 if dtype == torch.float64 else 1e-3
    for got, want in zip(passes(model), passes(plain), strict=True):
        assert_close(got, want, rtol=tolerance, atol=tolerance)
    graphs = [graph for slabs in idle_slabs(model) for graph in slabs.graphs.values()]
    assert graphs and all(graph.graph for graph in graphs)


def test_one_process_writes_the_text_without_shards(models):
    def texts(**shared) -> list[list[int]]:
        engine = load(models / "target", models / "draft", "cuda", "fp32", **shared)
        alone = [engine.generate(PROMPT, seed=3, max_new_tokens=40, **call).tokens for call in CALLS]
        return alone + [each.tokens for each in engine.generate([PROMPT, "hi"], seed=3, max_new_tokens=20, batch=2)]

    assert texts(context_parallel=True) == texts()


def shared_out(models, count: int, device: str, *more: str) -> subprocess.CompletedProcess[str]:
    words = ["generate", PROMPT, "--target", str(models / "target"), "--draft", str(models / "draft"), "--context-parallel", "--json"]
    words += ["--precision", "fp32", "--seed", "3", "--temperature", "1", "--max-new-tokens", "40", "--tree", "12x3x4", "--device", device]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "--master-port", str(free_port())]
    return subprocess.run([*command, "-m", "eyas", *words, *more], capture_output=True, text=True, timeout=240, env={**os.environ})


def test_processes_that_share_one_card_write_the_text_of_one(models):
    told = shared_out(models, 2, "cuda:0")
    assert told.returncode == 0, told.stderr
    found = json.loads(next(line for line in told.stdout.splitlines() if line.startswith("{")))
    wanted = load(models / "target", models / "draft", "cuda", "fp32").generate(
        PROMPT, seed=3, temperature=1.0, max_new_tokens=40, tree="12x3x4"
    )
    assert found["tokens"] == wanted.tokens
    assert found["context_parallel"]["processes"] == 2 and "goes through host memory" in told.stderr


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_process_for_each_card_writes_the_text_of_one(models):
    told = shared_out(models, 2, "cuda")
    assert told.returncode == 0, told.stderr
    found = json.loads(next(line for line in told.stdout.splitlines() if line.startswith("{")))
    wanted = load(models / "target", models / "draft", "cuda", "fp32").generate(
        PROMPT, seed=3, temperature=1.0, max_new_tokens=40, tree="12x3x4"
    )
    assert found["tokens"] == wanted.tokens


def test_a_graph_holds_a_message_between_cards(monkeypatch):
    """nccl with one process: what is captured and replayed is the same call."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    torch.cuda.set_device(0)
    distributed.init_process_group("nccl", rank=0, world_size=1)
    try:
        peers, given = Peers(), torch.arange(6.0, device="cuda")
        peers.backend = "nccl"
        graph = Graph(lambda x: (peers.gather(x * 2).sum(0) + 1,), [given])
        for number in range(3):
            given.fill_(float(number))
            (found,) = graph()
            peers.settle()
            assert found is not None and found.tolist() == [2.0 * number + 1] * 6
    finally:
        distributed.destroy_process_group()
