"""Kernels in C++ that are compiled where they are needed, and the operations made of them. Without a compiler
everything works all the same, slower."""
