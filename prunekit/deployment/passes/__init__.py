"""Graph passes: each rewrites an ``InferenceGraph`` in place into an equivalent, faster one."""
