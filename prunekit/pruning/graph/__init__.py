"""The graph of a model, how channels pass through it, and the groups that are pruned together."""
