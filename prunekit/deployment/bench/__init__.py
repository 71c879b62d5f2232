"""Latency: each model is timed in a process of its own, interleaved with the others."""
