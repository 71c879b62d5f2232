"""Tasks: what a model is trained for, with its loss, metrics and predictions. May import data and config."""
