"""Reasoning data in five steps (report §5), each a command from JSONL to JSONL that resumes; see docs/reasoning.md."""
