"""Sparse training: decays and penalties, gradual pruning."""
