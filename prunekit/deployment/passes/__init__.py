"""Graph passes. Each takes a traced graph and rewrites it into an equivalent, faster one."""
