"""The policy: groups of completions, their log-probabilities, the shared prompt and the update."""

from rl.policy.scoring import Group, Score, banned_tokens, score, token_log_probs

__all__ = ["Group", "Score", "banned_tokens", "score", "token_log_probs"]
