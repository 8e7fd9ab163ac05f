"""A small conditional video diffusion model that predicts what a camera sees next, after SlowFast-VGen."""
