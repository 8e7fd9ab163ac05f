"""Log-probabilities of a reply's tokens in OpenAI's format."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}
"""Character of a byte-level tokenizer → its byte."""


def token_logprobs(tokenizer: PreTrainedTokenizerBase, scored: Sequence[tuple[int, float]]) -> dict[str, Any]:
    """The field `logprobs` of a choice, from (id, log-probability) of each token; special tokens are included."""
    content = []
    for token, logprob in scored:
        data = _token_bytes(tokenizer, token)
        text = data.decode("utf-8", "replace")
        content.append({"token": text, "logprob": logprob, "bytes": list(data), "top_logprobs": []})
    return {"content": content, "refusal": None}


def _token_bytes(tokenizer: PreTrainedTokenizerBase, token: int) -> bytes:
    """The UTF-8 bytes of a token, which may be a part of a character."""
    written = tokenizer.convert_ids_to_tokens(token) or ""
    if token not in tokenizer.added_tokens_decoder and all(character in _BYTES for character in written):
        return bytes(_BYTES[character] for character in written)
    return tokenizer.decode([token]).encode()
