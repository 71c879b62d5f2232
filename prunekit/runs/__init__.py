"""The run folder: its files, state, stage order and training checkpoints.

Imports ``utils`` and ``errors``; never torch.
"""
