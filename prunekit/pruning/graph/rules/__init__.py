"""What operations do with the axes of tensors: one rule for each, by the operation's name; a file for each family.

May import the terms of axes and the record.
"""

from prunekit.pruning.graph.rules import elementwise, indexing, layers, matmul, norms, reductions, views

__all__ = ["elementwise", "indexing", "layers", "matmul", "norms", "reductions", "views"]
