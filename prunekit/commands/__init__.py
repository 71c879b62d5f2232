"""One module for each command that works on runs and recipes: bench, evaluate, predict, import, groups, list, watch.

Imports everything except ``cli``.
"""
