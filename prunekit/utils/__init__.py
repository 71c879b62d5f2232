"""Helpers that know nothing about pruning: atomic files, decoding, processes, logging, signals, progress.

Imports ``errors`` only.
"""
