"""From a plan to a slim model: slicing of tensors, constant folding and the equivalence check."""
