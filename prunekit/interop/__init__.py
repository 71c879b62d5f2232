"""Files of other projects: the published CSNet checkpoints and layouts. May import ``pruning`` and below."""
