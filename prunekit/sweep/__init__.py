"""Many runs of one recipe: the settings, the work that they share, the processes that do it, and their results.

Imports everything except ``commands`` and ``cli``.
"""
