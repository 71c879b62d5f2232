"""C++ kernels for CPUs, compiled on first use, and autograd operations on them. May import utils and errors."""
