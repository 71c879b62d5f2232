"""``python -m prunekit.cli``, for torchrun."""

from prunekit.cli import main

main()
