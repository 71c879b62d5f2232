"""Sparse training: decays and penalties, the controller of λ, pruning while training."""
