"""Words → ids, such that what people write can never become one of the stream's own tokens.

A chat template joins the stream's tokens and people's words into one text, and a tokenizer cannot tell them apart: a
question that holds `<|im_end|>` would end its turn, one that holds `<|video_pad|>` would ask for a video. So a special
token inside words gets an invisible mark behind its first character (`guard`). Any tokenizer reads the marked text as
plain characters; `ids` takes the mark out again and spells what stood there letter by letter.
"""

import re

from transformers import PreTrainedTokenizerFast

from keye.prompt.stream import CONTENT_TOKENS, SPECIAL_TOKENS

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
        if not self._marked.search(text):
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids: list[int] = []
        for piece in self._special.split(text):
            if self._special.fullmatch(piece):
                ids.append(self.tokenizer.convert_tokens_to_ids(piece))
            elif piece:
                plain = self._marked.sub(lambda found: found[0].replace(MARK, "", 1), piece)
                ids += self.tokenizer(plain, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids
