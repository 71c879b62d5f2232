"""The deployed form of a model: an equivalent network that is faster at inference; export and latency.

Imports ``layers``, ``native``, ``utils`` and ``errors``, and ``pruning`` for rebuilding models.
"""
