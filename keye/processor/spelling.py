"""Text → ids, such that the text of a message never becomes one of the stream's special tokens.

A chat template joins special tokens and the text of messages into one string, and a tokenizer cannot distinguish them:
a question that contains `<|im_end|>` would end its turn, one with `<|video_pad|>` would ask for a video. Therefore
`guard` puts an invisible mark after the first character of a special token in a message. A tokenizer reads the marked
text as plain characters; `ids` removes the mark and tokenizes the characters without special tokens.
"""

import re

from transformers import PreTrainedTokenizerFast

from keye.processor.stream import CONTENT_TOKENS, SPECIAL_TOKENS

MARK = "\u2060"  # word joiner: no width, breaks no line, is part of no special token


class Spelling:
    """Guards message texts and turns rendered text into ids, for one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        special = sorted({*SPECIAL_TOKENS, *added, *tokenizer.all_special_tokens}, key=len, reverse=True)
        guarded = [token for token in special if token not in CONTENT_TOKENS and len(token) > 1]
        self._special = re.compile("(" + "|".join(map(re.escape, special)) + ")")
        self._guarded = re.compile("|".join(map(re.escape, guarded)))
        self._marked = re.compile("|".join(re.escape(token[0] + MARK + token[1:]) for token in guarded))

    def guard(self, text: str) -> str:
        """The text with a mark in every special token except `CONTENT_TOKENS` (times and places)."""
        while self._guarded.search(text):  # repeated, in case two overlap
            text = self._guarded.sub(lambda found: found[0][0] + MARK + found[0][1:], text)
        return text

    def ids(self, text: str) -> list[int]:
        """Ids of rendered text: special tokens have their ids, marked ones the ids of their characters."""
        return self.located(text)[0]

    def located(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """`ids`, and for each the positions of its first and its last character in the text."""
        if not self._marked.search(text):
            return self._tokens(text, list(range(len(text))), False)
        ids: list[int] = []
        places: list[tuple[int, int]] = []
        start = 0
        for piece in self._special.split(text):
            if self._special.fullmatch(piece):
                ids.append(self.tokenizer.convert_tokens_to_ids(piece))
                places.append((start, start + len(piece) - 1))
            elif piece:
                marks = {found.start() + 1 for found in self._marked.finditer(piece)}  # after the first character
                kept = [place for place in range(len(piece)) if place not in marks]
                more = self._tokens("".join(piece[k] for k in kept), [start + k for k in kept], True)
                ids, places = ids + more[0], places + more[1]
            start += len(piece)
        return ids, places

    def _tokens(self, text: str, places: list[int], split: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of plain text, and the entries of `places` at the first and the last character of each."""
        found = self.tokenizer(text, add_special_tokens=False, split_special_tokens=split, return_offsets_mapping=True)
        last = len(places) - 1
        bounds = [(places[min(a, last)], places[min(max(a, b - 1), last)]) for a, b in found["offset_mapping"]]
        return found["input_ids"], bounds
