"""From a plan to a slim model: slicing tensors, folding constants, the equivalence check."""
