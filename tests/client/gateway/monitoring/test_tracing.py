"""Requests are recorded as spans by OpenTelemetry's own SDK."""

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from treeswarm.errors import NodeLost
from treeswarm_client.gateway.monitoring.tracing import Tracing
from treeswarm_client.generation.run import Run


async def _nothing():  # type: ignore[no-untyped-def]
    return
    yield


def test_request_is_recorded_as_a_span() -> None:
    spans, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    tracing = Tracing()
    tracing._tracer = provider.get_tracer("test")
    whole = Run(_nothing(), [1, 2, 3], token_ids=[4, 5], finish_reason="length", prefix_tokens=2)
    broken = Run(_nothing(), [1], token_ids=[6])
    with tracing.request([whole]):
        pass
    with pytest.raises(NodeLost), tracing.request([broken]):
        raise NodeLost("the node died", "node:1")
    first, second = spans.get_finished_spans()
    assert first.name == second.name == "generate"
    assert first.attributes is not None
    assert first.attributes["gen_ai.usage.output_tokens"] == 2
    assert first.attributes["treeswarm.cached_tokens"] == 2
    assert first.attributes["gen_ai.response.finish_reasons"] == ("length",)
    assert not first.events
    assert second.events[0].name == "exception"
    assert second.attributes is not None
    assert second.attributes["gen_ai.response.finish_reasons"] == ("broken",)


def test_without_an_sdk_nothing_is_recorded() -> None:
    tracing = Tracing()
    with tracing.request([]):
        pass
    tracing._tracer = None
    with pytest.raises(KeyError), tracing.request([]):
        raise KeyError
