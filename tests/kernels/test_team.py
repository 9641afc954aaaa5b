"""The kernel's threads share a pass: with any number of them, without cores and after a fork, it is the same to the last bit."""

from __future__ import annotations

import os
import threading
from types import SimpleNamespace

import pytest
import torch

from eyas.kernels import native
from eyas.model.mask import ancestor_mask
from eyas.model.rows import Rows, Segment, chain_rows
from tests.tiny import tiny_target

pytestmark = pytest.mark.skipif(native.kernel() is None, reason="no C compiler: PyTorch's threads are all there are")
PARENTS = [-1, 0, 0, 1, 1, 2, 3, 3]


def target(**changes):
    sizes = {"head_dim": 16, "hidden_size": 64, "intermediate_size": 160, "vocab_size": 301}
    return tiny_target(prepare=False, dtype=torch.float32, **sizes | changes).to(torch.bfloat16).prepare(changes.get("bits", 16))


def texts(model) -> list[torch.Tensor]:
    """Logits of a long prompt and of a tree behind it."""
    cache, draw = model.new_cache(1, 300), torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 301, (200,), generator=draw).tolist()
    read = model(chain_rows(0, tokens, 0), cache).logits
    cache.keep(0, range(200))
    depths = [0, 1, 1, 2, 2, 2, 3, 3]
    tree = Rows(torch.tensor(tokens[:8]), torch.tensor([200 + depth for depth in depths]), [Segment(0, 8, ancestor_mask(PARENTS))])
    return [read, model(tree, cache).logits]


def test_more_threads_than_cores_change_no_bit(threads):
    model = target()
    threads(1)
    wanted = texts(model)
    for count in (2, 3, 4 * (os.cpu_count() or 1) + 1):  # with the last, most threads have no core
        threads(count)
        for _ in range(20):
            for got, want in zip(texts(model), wanted):
                assert torch.equal(got, want)


def test_what_a_thread_without_a_core_left_undone_is_done_by_others(threads):
    model, before = target(), native.computed_again()
    threads(8 * (os.cpu_count() or 1))
    for _ in range(2000):
        texts(model)
        if native.computed_again() > before:
            return
    pytest.fail("every thread had a core each time, which eight threads to a core cannot have")


def test_two_callers_at_once_get_their_own_results(threads):
    threads(2)
    model, wrong = target(), []
    wanted = texts(model)

    def ask() -> None:
        torch.set_num_threads(2)
        for _ in range(30):
            wrong.extend(1 for got, want in zip(texts(model), wanted) if not torch.equal(got, want))

    callers = [threading.Thread(target=ask) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_a_forked_child_has_threads_of_its_own(threads):
    threads(2)
    model = target()
    wanted = texts(model)
    child = os.fork()
    if child == 0:
        with native.threads.lead():  # PyTorch's own threads do not survive a fork
            same = all(torch.equal(got, want) for _ in range(5) for got, want in zip(texts(model), wanted))
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_what_a_lagging_thread_reads_is_held_until_none_lags():
    held = torch.zeros(3)
    native.settled(1, held)
    assert any(held is each for group in native.LAGGING for each in group)
    native.settled(0)
    assert not native.LAGGING


def test_pytorch_computes_with_one_thread_while_the_kernels_lead_and_with_its_own_number_after(threads):
    threads(3)
    with native.threads.lead():
        assert torch.get_num_threads() == 1 and native.threads() == 3
        with native.threads.lead():
            assert native.threads() == 3
        assert torch.get_num_threads() in (1, 3) and native.threads() == 3
    assert torch.get_num_threads() == 3 and native.threads() == 3
    with pytest.raises(ValueError), native.threads.lead():
        raise ValueError
    assert torch.get_num_threads() == 3


def test_a_call_that_saw_no_thread_lag_lets_nothing_go_while_one_lags_now(monkeypatch):
    held, library = torch.zeros(3), native.library()
    native.settled(1, held)
    with monkeypatch.context() as patch:
        patch.setattr(native, "library", lambda: SimpleNamespace(eyas_lagging=lambda: 1))
        native.settled(0)  # another caller's job has run since
        assert any(held is each for group in native.LAGGING for each in group)
    assert native.library() is library
    native.settled(0)
    assert not native.LAGGING
