"""Data sets (image and mask folders, class folders, generated and bundled sets), their tensors, and augmentations.

Imports ``config``, ``utils`` and ``errors``.
"""
