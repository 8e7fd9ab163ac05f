"""A local model directory that answers as an endpoint does, in this process."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

from keye.errors import KeyeError
from rl.endpoint.ask import Answer, Ask, read_answer
from rl.endpoint.errors import EndpointError, RefusedRequest


class LocalModel:
    """The model of a directory, with the batching of `keye serve` and without HTTP.

    It accepts the parts of a request that the server accepts; clips may be files anywhere. Its name in the keys of the
    cache is a digest of its files.

    Args:
        directory: a model directory.
        batch: answers generated together.
        device, dtype: as for `keye.inference.chat.load_model`.
    """

    def __init__(self, directory: str | Path, batch: int = 8, device: str = "auto", dtype: str = "auto") -> None:
        from keye.inference.answerer import Answerer
        from keye.inference.chat import load_model

        self.directory = Path(directory)
        model, processor = load_model(self.directory, device, dtype)
        self._answerer = Answerer(model, processor, "local", batch=batch, waiting=1 << 30)
        self.name = f"local:{_digest(self.directory)}"

    def __repr__(self) -> str:
        return str(self.directory)

    async def complete(self, ask: Ask, seconds: float) -> Answer:
        """One attempt; `seconds` is the client's concern.

        Raises:
            RefusedRequest: the model cannot answer this request. EndpointError: it failed.
        """
        return await asyncio.to_thread(self._answer, ask)

    async def close(self) -> None:
        """Stop generating."""
        await asyncio.to_thread(self._answerer.close)

    def _answer(self, ask: Ask) -> Answer:
        from keye.inference.logprobs import token_logprobs
        from keye.inference.openai_format import Access, read_request

        try:
            access = Access(Path("/"), max_bytes=1 << 40)
            request = read_request(json.dumps(self._fields(ask)).encode(), access, ask.max_tokens)
            answering = self._answerer.start(request)
            texts = {True: "", False: ""}
            for piece in answering:
                texts[piece.thinking] += piece.text
        except KeyeError as error:
            failed = error.__cause__ is not None and "the model failed" in str(error)
            raise (EndpointError if failed else RefusedRequest)(f"{self!r} cannot answer: {error}") from error
        choice: dict[str, Any] = {"finish_reason": answering.figures.finish}
        if answering.logprobs is not None:
            choice["logprobs"] = token_logprobs(answering.tokenizer, answering.scored())
        message = {"content": texts[False]} | ({"reasoning_content": texts[True]} if texts[True] else {})
        usage = {"prompt_tokens": answering.figures.prompt_tokens, "completion_tokens": answering.figures.new_tokens}
        return read_answer({"choices": [choice | {"message": message}], "usage": usage})

    @staticmethod
    def _fields(ask: Ask) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "messages": list(ask.messages), "max_completion_tokens": ask.max_tokens, "temperature": ask.temperature,
            "logprobs": ask.logprobs,
        }  # fmt: skip
        if ask.temperature:
            fields |= {"seed": ask.sample, "top_p": ask.top_p}
        if ask.thinking is not None:
            fields["chat_template_kwargs"] = {"enable_thinking": ask.thinking}
        return fields


def _digest(directory: Path) -> str:
    """Digest of the files of a model directory: names and contents."""
    digest = hashlib.sha256()
    for path in sorted(path for path in directory.iterdir() if path.is_file()):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while data := file.read(1 << 22):
                digest.update(data)
    return digest.hexdigest()[:16]
