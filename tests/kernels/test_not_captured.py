"""Where CUDA cannot capture a graph its steps are launched one by one: one warning, nothing lost. Here the capture is made to fail."""

from __future__ import annotations

import pytest
import torch

from eyas.config import PLAIN, Sampling, TreeShape
from eyas.decode.generate import Decoder
from eyas.drafters.eagle3 import Eagle3Drafter
from eyas.kernels import captured
from eyas.kernels.captured import Graph, NotCaptured
from eyas.model.cache import Pool, Slabs
from eyas.train.device_writer import DevicePlay, conversations
from tests.tiny import tiny_draft, tiny_target
from tests.train.test_fixed_writer import KINDS, said_by_any_rows, told
from tests.train.test_selfplay import talkative
from tests.train.writing import QUESTIONS, template

WHY = "CUDA error: operation not permitted when stream is capturing\nCUDA kernel errors might be asynchronously reported"
SAID = "CUDA cannot capture these steps as one graph (RuntimeError: CUDA error: operation not permitted when stream is capturing)"


@pytest.fixture
def tried(monkeypatch):
    """The number of captures that were tried: each ran the function, as CUDA does before the capture, and failed."""
    count = []

    def capture(run, inputs, *_where):
        run(*inputs)
        count.append(1)
        raise RuntimeError(WHY)

    monkeypatch.setattr(captured, "WINDOW", 64)
    monkeypatch.setattr(captured, "captures", lambda device: True)
    monkeypatch.setattr(captured, "capture", capture)
    monkeypatch.setattr(Graph, "refused", 0)
    return count


def pair(pooled):
    target = tiny_target(prepare=False, vocab_size=8)
    network, vocab = tiny_draft(target, draft_vocab_size=7)
    network.prepare()
    target.prepare()
    target.pool, network.pool = (Pool(), Pool()) if pooled else (None, None)
    return target, Eagle3Drafter(network, vocab)


def run(target, drafter, sampling, shape="20x4x5"):
    *_, (text,) = Decoder(target, drafter).run([[1, 2, 3]], TreeShape.parse(shape) if drafter else PLAIN, sampling, [5], 40)
    return text.tokens, text.accepted_lengths, text.finish_reason


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.3), Sampling(0.9, top_p=0.9)], ids=str)
def test_plain_rounds_serve_and_each_form_is_tried_once(sampling, tried, capsys):
    wanted, both = run(*pair(False), sampling), pair(True)
    assert run(*both, sampling) == wanted
    said = capsys.readouterr().err
    assert said.startswith(SAID) and said.count("\n") == 1
    forms = len(tried)
    assert 2 < forms < 40, "the round, the growth, and passes of a few numbers of rows"
    assert run(*both, sampling) == wanted
    assert len(tried) == forms and not capsys.readouterr().err


def test_rounds_of_several_texts_go_on_launched(tried):
    def texts(pooled, drafted):
        target, drafter = pair(pooled)
        decoder = Decoder(target, drafter if drafted else None)
        *_, found = decoder.run([[1, 2], [3], [4]], TreeShape.parse("8x2x3") if drafted else PLAIN, Sampling(1.3), [5, 6, 7], 12)
        return [(text.tokens, text.accepted_lengths) for text in found]

    for drafted in (False, True):
        assert texts(True, drafted) == texts(False, drafted)
    assert tried


def test_plain_decoding_goes_on_too(tried):
    assert run(pair(True)[0], None, Sampling(1.3)) == run(pair(False)[0], None, Sampling(1.3))
    assert tried


def test_processes_that_capture_alike_end_instead(tried):
    slabs = Slabs((1, 1, 1, 64, 8), torch.float32, torch.device("cpu"), pooled=True)
    slabs.captured_alike = True
    with pytest.raises(NotCaptured, match="operation not permitted"):
        captured.fixed_call(lambda x: (x,), ("form",), slabs, torch.zeros(3))


def test_text_is_written_by_passes_of_any_rows(tried):
    target = talkative().prepare()
    play = DevicePlay.of(KINDS, torch.device("cpu"))
    found = {index: row and told(row) for index, row in conversations(target, template(), play, QUESTIONS, iter(range(12)), 400)}
    assert len(tried) == 1 and found == said_by_any_rows(play, 12, lambda: talkative().prepare())
