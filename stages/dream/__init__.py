"""Training of `keye.dream` after SlowFast-VGen: the slow stage and the slow-fast loop."""
