"""The sample clips of scripts/clips.py."""

from scripts.clips import clip, fetch_clips

__all__ = ["clip", "fetch_clips"]
