"""Which channels to prune: importance scores, limits, budgets, and the resulting plan."""
