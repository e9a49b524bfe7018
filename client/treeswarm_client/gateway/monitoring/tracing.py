"""OpenTelemetry spans of the gateway's requests.

They are recorded where OpenTelemetry's API is installed and an SDK is set up, as by
`opentelemetry-instrument swarm serve …`.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from treeswarm_client.generation.run import Run


class Tracing:
    """Records one span per request."""

    def __init__(self) -> None:
        self._tracer: Any = None
        with contextlib.suppress(ImportError):
            from opentelemetry import trace  # noqa: PLC0415  # an optional dependency

            self._tracer = trace.get_tracer("treeswarm.gateway")

    @contextlib.contextmanager
    def request(self, runs: Sequence[Run]) -> Iterator[None]:
        """Record a span that lasts as long as the request's generations, and the error that ends them, if any."""
        if self._tracer is None:
            yield
            return
        # The span is not made current: an asynchronous generator may be closed in another context.
        span = self._tracer.start_span("generate", attributes={"treeswarm.choices": len(runs)})
        try:
            yield
        except Exception as error:
            span.record_exception(error)
            raise
        finally:
            span.set_attributes(_attributes_of(runs))
            span.end()


def _attributes_of(runs: Sequence[Run]) -> dict[str, Any]:
    return {
        "gen_ai.usage.input_tokens": sum(len(run.prompt_ids) for run in runs),
        "gen_ai.usage.output_tokens": sum(len(run.token_ids) for run in runs),
        "treeswarm.cached_tokens": sum(run.prefix_tokens for run in runs),
        "treeswarm.traversals": sum(run.recorder.traversals for run in runs),
        "treeswarm.failovers": sum(len(run.recorder.recoveries) for run in runs),
        "treeswarm.driven_tokens": sum(use.tokens for run in runs for use in run.drivers),
        "treeswarm.tree_nodes": sum(run.recorder.drafted for run in runs),
        "gen_ai.response.finish_reasons": [run.finish_reason or "broken" for run in runs],
    }
