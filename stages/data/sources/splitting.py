"""Splitting: plain text longer than the context becomes consecutive documents without the loss of a token."""

import torch

from keye.errors import ManifestError
from keye.processor.processor import Sample
from stages.data.sources.chat import Row

IGNORED = -100


def is_plain_text(messages: list[Row]) -> bool:
    """Whether a chat is a single text of the assistant, like rows with a `text` column."""
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        return False
    content = messages[0]["content"]
    return isinstance(content, str) or all(part["type"] == "text" for part in content)


def split(sample: Sample, limit: int) -> list[Sample]:
    """A text → documents of at most `limit` tokens, in order; an unchanged text if it fits.

    Each document starts with the opening of the assistant's turn, which has no label; only the last one ends the turn.
    The labels of all documents together are those of the text.

    Raises:
        ManifestError: the limit is too small for any text.
    """
    if len(sample) <= limit:
        return [sample]
    learned = (sample.labels != IGNORED).nonzero()[:, 0]
    first = int(learned[0]) if len(learned) else 0
    room = limit - first
    if not len(learned) or room < 1:
        raise ManifestError(f"a text of {len(sample)} tokens cannot be split into documents of {limit} tokens")
    head = sample.input_ids[:first]
    parts = []
    for ids, labels in zip(sample.input_ids[first:].split(room), sample.labels[first:].split(room), strict=True):
        if not bool((labels != IGNORED).any()):  # only the end of the turn
            continue
        document = torch.cat([head, ids])
        masked = torch.cat([torch.full_like(head, IGNORED), labels])
        parts.append(Sample(document, masked, torch.arange(len(document)).expand(3, -1)))
    return parts
