"""The training loop and what plugs into it: step, checkpoint, EMA, distillation, optimizers, schedules, trackers.

Imports ``pruning``, ``tasks``, ``data``, ``runs``, ``config`` and ``utils``.
"""
