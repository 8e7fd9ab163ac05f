"""SlowFast Networks (arXiv 1812.03982): the two-pathway network for motion."""
