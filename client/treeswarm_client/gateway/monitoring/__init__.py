"""What the gateway reports about itself: metrics for Prometheus, spans for OpenTelemetry."""
