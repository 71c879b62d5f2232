"""Latency benchmarks: each model is timed in its own process, interleaved with the others."""
