"""A run from recipe to report: the runner, its stages, the context they share, models in run folders, export.

Imports everything except ``commands`` and ``cli``.
"""
