"""What the operations of a model are: who calls them, what shapes they give, how many multiply-adds they take.

Imports ``utils``.
"""
