"""Words → ids, such that what people write can never become one of the stream's own tokens.

A chat template joins the stream's tokens and people's words into one text, and a tokenizer cannot tell them apart: a
question that holds `<|im_end|>` would end its turn, one that holds `<|video_pad|>` would ask for a video. So a special
token inside words gets an invisible mark behind its first character (`guard`). Any tokenizer reads the marked text as
plain characters; `ids` takes the mark out again and spells what stood there letter by letter.
"""

import re

from transformers import PreTrainedTokenizerFast

from keye.processor.stream import CONTENT_TOKENS, SPECIAL_TOKENS

MARK = "\u2060"  # word joiner: no width, breaks no line, is part of no special token


class Spelling:
    """Guards words and turns rendered text into ids, for one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        special = sorted({*SPECIAL_TOKENS, *added, *tokenizer.all_special_tokens}, key=len, reverse=True)
        guarded = [token for token in special if token not in CONTENT_TOKENS and len(token) > 1]
        self._special = re.compile("(" + "|".join(map(re.escape, special)) + ")")
        self._guarded = re.compile("|".join(map(re.escape, guarded)))
        self._marked = re.compile("|".join(re.escape(token[0] + MARK + token[1:]) for token in guarded))

    def guard(self, words: str) -> str:
        """The words with a mark in every special token, but for those that are content: times and places."""
        while self._guarded.search(words):  # again, in case two overlap
            words = self._guarded.sub(lambda found: found[0][0] + MARK + found[0][1:], words)
        return words

    def ids(self, text: str) -> list[int]:
        """Ids of rendered text: special tokens are themselves, marked ones the characters they are written with."""
        return self.located(text)[0]

    def located(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """`ids`, and for each of them where in the text its first and its last character stand."""
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
                marks = {found.start() + 1 for found in self._marked.finditer(piece)}  # behind the first character
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
