"""Channel pruning: plans, and the packages ``graph``, ``sparsity``, ``selection`` and ``surgery``.

Imports ``layers``, ``flops``, ``config``, ``utils`` and ``errors``.
"""
