"""Claims about spans: one for each request, of its own times and counts, below the caller's own span; none unless asked for."""

from __future__ import annotations

import pytest

from tests.serve.serving import CHAT, TEXT, ask, events, served

pytest.importorskip("opentelemetry.sdk", reason="needs opentelemetry-sdk")

import itertools

from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from eyas.serve.traces import Traces, signed

CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def traced(engine):
    """A client, and what gives the spans of the requests so far."""
    exporter = InMemorySpanExporter()
    with served(engine, "--slots", "2", "--prefix-cache") as (client, server):
        assert server.traces is None
        server.traces = Traces("hawk", exporter)

        def spans():
            server.traces.provider.force_flush()
            found = list(exporter.get_finished_spans())
            exporter.clear()
            return found

        yield client, spans


def test_a_request_has_a_span_with_its_parts_below(traced):
    client, spans = traced
    for stream in (False, True):
        answer = client.post(CHAT, json=ask(stream=stream, temperature=0.5), headers={"traceparent": f"00-{'-'.join(CALLER)}-01"})
        told = events(answer.text)[-2] if stream else answer.json()
        whole, *parts = sorted(spans(), key=lambda span: (span.kind.name != "SERVER", span.start_time))
        assert [span.name for span in parts] == ["queue", "prefill", "decode"] and whole.name == "chat hawk"
        assert f"{whole.context.trace_id:032x}" == CALLER[0] and f"{whole.parent.span_id:016x}" == CALLER[1]
        assert all(span.parent.span_id == whole.context.span_id for span in parts)
        had = whole.attributes
        assert had["gen_ai.operation.name"] == "chat" and had["gen_ai.response.id"] == told["id"] and "error.type" not in had
        assert had["gen_ai.request.temperature"] == 0.5 and had["gen_ai.request.seed"] == 5 and had["gen_ai.request.max_tokens"] == 20
        assert had["gen_ai.usage.output_tokens"] <= 20 and had["gen_ai.response.finish_reasons"] == ("length",)
        assert parts[2].attributes["eyas.tau"] >= 1 and parts[1].attributes["eyas.prompt_tokens"] == had["gen_ai.usage.input_tokens"]
        moments = [whole.start_time, *(moment for span in parts for moment in (span.start_time, span.end_time)), whole.end_time]
        assert all(before <= after + 1e6 for before, after in itertools.pairwise(moments))


def test_each_choice_has_parts_and_one_that_is_left_is_an_error(traced):
    client, spans = traced
    client.post(TEXT, json={"prompt": ["a hawk", "an owl"], "max_tokens": 4, "seed": 1})
    found = spans()
    (whole,) = (span for span in found if span.name == "text_completion hawk")
    assert sorted(span.attributes["eyas.choice"] for span in found if span is not whole) == [0, 0, 0, 1, 1, 1]
    assert len(whole.attributes["gen_ai.response.finish_reasons"]) == 2
    client.post(CHAT, json=ask(temperature=9))
    assert spans() == []  # refused before anything was asked of the model


def test_seeds_fit_into_an_attribute():
    assert [signed(seed) for seed in (0, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)] == [0, (1 << 63) - 1, -(1 << 63), -1]
