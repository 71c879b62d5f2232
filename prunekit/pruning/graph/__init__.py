"""The graph of a model, how channels propagate through it, and the groups that are pruned together."""
