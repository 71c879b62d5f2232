"""Deployment: rewriting models for fast inference, export to ONNX, OpenVINO and pt2, and latency benchmarks.

May import ``pruning``, ``tasks``, ``data``, ``layers``, ``native``, ``utils`` and ``errors``.
"""
