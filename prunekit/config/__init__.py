"""Recipes: registry of names, YAML, schema, merging of files and overrides, plugin modules.

Imports ``utils`` and ``errors``; never torch.
"""
