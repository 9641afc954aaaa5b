"""A span for each request, by OpenTelemetry and under the names of its conventions for generative AI, with queue, prefill and decode below.

Spans are made when a request has ended, out of the times that its sequences keep: while it runs nothing is computed. Knows jobs and the
fields' values; knows nothing of HTTP but headers. Needs opentelemetry-sdk, and for sending opentelemetry-exporter-otlp-proto-http.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import eyas
from eyas.config import EyasError
from eyas.decode.sequence import tau_of
from eyas.serve.fields import CHAT

if TYPE_CHECKING:
    from eyas.decode.sequence import Sequence
    from eyas.serve.scheduler import Job

NAMES = {CHAT: "chat"}  # of what is done; else text_completion
ASKED = {  # a field, and what it is called
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "top_k": "gen_ai.request.top_k",
    "frequency_penalty": "gen_ai.request.frequency_penalty",
    "presence_penalty": "gen_ai.request.presence_penalty",
    "n": "gen_ai.request.choice.count",
    "stop": "gen_ai.request.stop_sequences",
}


class Traces:
    """Where spans go. `exporter`: None sends them where OTEL_EXPORTER_OTLP_ENDPOINT says. Raises `EyasError` where a package is missing."""

    def __init__(self, model: str, exporter: Any = None) -> None:
        try:
            from opentelemetry import propagate, trace
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor

            if exporter is None:
                from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # pyright: ignore[reportMissingImports]

                exporter = OTLPSpanExporter()
        except ImportError as error:
            raise EyasError(f"--traces needs {error.name}: pip install 'eyas[otel]'") from None
        self.model, self.api, self.propagate = model, trace, propagate
        self.provider = TracerProvider(resource=Resource.create({"service.name": "eyas", "service.version": eyas.__version__}))
        self.provider.add_span_processor(BatchSpanProcessor(exporter))
        self.tracer = self.provider.get_tracer("eyas.serve", eyas.__version__)

    def request(self, kind: str, values: Mapping[str, Any], answer: str, headers: Mapping[str, str]) -> Trace:
        """What is kept of a request until it ends. `kind`: of its path; `answer`: its answer's id; `headers`: they may name the span that
        it belongs to."""
        told: dict[str, Any] = {
            "gen_ai.operation.name": NAMES.get(kind, "text_completion"),
            "gen_ai.provider.name": "eyas",
            "gen_ai.request.model": values["model"] or self.model,
            "gen_ai.response.model": self.model,
            "gen_ai.response.id": answer,
            **{name: values[field] for field, name in ASKED.items() if values[field] not in (None, ())},
        }
        return Trace(self, told, self.propagate.extract({name.lower(): value for name, value in headers.items()}))

    def span(self, name: str, began: float, ended: float, context: Any, told: Mapping[str, Any], server: bool = False) -> Any:
        """A span that is over; times are those of time.perf_counter."""
        kind = self.api.SpanKind.SERVER if server else self.api.SpanKind.INTERNAL
        span = self.tracer.start_span(name, context, kind, dict(told), start_time=on_the_wall(began))
        span.end(on_the_wall(ended))
        return span


@dataclass
class Trace:
    """One request until its span is made."""

    traces: Traces
    told: dict[str, Any]
    context: Any  # the span that it belongs to, if it named one

    def ended(self, job: Job) -> None:
        """Its job is over, in whatever way."""
        traces, sequences, told = self.traces, job.sequences, self.told
        cut = any(sequence.finish_reason in (None, "aborted") for sequence in sequences)
        told |= {
            "gen_ai.request.seed": signed(sequences[0].seed),
            "gen_ai.request.max_tokens": sequences[0].limit - sequences[0].prompt_length,
            "gen_ai.usage.input_tokens": sum(map(len, {tuple(each.tokens[: each.prompt_length]) for each in sequences})),
            "gen_ai.usage.output_tokens": sum(len(each.tokens) - each.prompt_length for each in sequences),
            "gen_ai.usage.cache_read.input_tokens": sum(each.reused for each in sequences),
            "gen_ai.response.finish_reasons": [each.finish_reason or "aborted" for each in sequences],
            **({"error.type": "aborted"} if cut else {}),
        }
        name = f"{told['gen_ai.operation.name']} {told['gen_ai.request.model']}"
        now = time.perf_counter()
        last = max((each.admitted + each.seconds for each in sequences if each.admitted), default=now)
        span = traces.span(name, job.asked, now if cut else max(last, job.asked), self.context, told, server=True)
        below = traces.api.set_span_in_context(span)
        for number, sequence in enumerate(sequences):
            self.parts(sequence, number, job.asked, now, below)

    def parts(self, sequence: Sequence, number: int, asked: float, now: float, below: Any) -> None:
        """The spans of one sequence: those that it came to."""
        span, choice = self.traces.span, {"eyas.choice": number}
        seated, first = sequence.seated or now, sequence.admitted + sequence.prefill_seconds if sequence.prefill_seconds else now
        span("queue", asked, max(seated, asked), below, choice)
        if sequence.seated:
            told = {"eyas.prompt_tokens": sequence.prompt_length, "eyas.reused_tokens": sequence.reused}
            span("prefill", seated, first, below, choice | told)
        if sequence.prefill_seconds:
            told = {"eyas.rounds": sequence.rounds, "eyas.tau": tau_of(sequence)}
            span("decode", first, sequence.admitted + sequence.seconds, below, choice | told)


def on_the_wall(moment: float) -> int:
    """A moment of time.perf_counter in nanoseconds of time.time_ns."""
    return time.time_ns() - int(1e9 * (time.perf_counter() - moment))


def signed(seed: int) -> int:
    """A seed of 64 bits as attributes can hold it."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed
