"""Tasks: what a model is trained for: its loss, its metrics and how it is applied to an image."""
