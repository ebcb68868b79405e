"""Memory profiler."""
