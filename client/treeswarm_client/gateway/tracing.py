"""OpenTelemetry's spans of what a gateway does, where its API is installed and whoever runs it has set up an SDK
(`opentelemetry-instrument swarm serve …`); else nothing."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from treeswarm_client.generation.run import Run


class Tracing:
    """Spans of requests: one each."""

    def __init__(self) -> None:
        self._tracer: Any = None
        with contextlib.suppress(ImportError):
            from opentelemetry import trace  # noqa: PLC0415  # an extra

            self._tracer = trace.get_tracer("treeswarm.gateway")

    @contextlib.contextmanager
    def request(self, runs: Sequence[Run]) -> Iterator[None]:
        """Lasts as long as the request's generations; an error that ends them is recorded."""
        if self._tracer is None:
            yield
            return
        # Not the current span of its context: an asynchronous generator may be closed in another one.
        span = self._tracer.start_span("generate", attributes={"treeswarm.choices": len(runs)})
        try:
            yield
        except Exception as error:
            span.record_exception(error)
            raise
        finally:
            span.set_attributes(_of(runs))
            span.end()


def _of(runs: Sequence[Run]) -> dict[str, Any]:
    """What became of them."""
    return {
        "gen_ai.usage.input_tokens": sum(len(run.prompt_ids) for run in runs),
        "gen_ai.usage.output_tokens": sum(len(run.token_ids) for run in runs),
        "treeswarm.cached_tokens": sum(run.prefix_tokens for run in runs),
        "treeswarm.traversals": sum(run.meter.traversals for run in runs),
        "treeswarm.failovers": sum(len(run.meter.recoveries) for run in runs),
        "treeswarm.tree_nodes": sum(run.meter.drafted for run in runs),
        "gen_ai.response.finish_reasons": [run.finish_reason or "broken" for run in runs],
    }
