"""`keye serve`: an OpenAI-compatible server for one model, on FastAPI and uvicorn.

GET /v1/models, POST /v1/chat/completions (complete or as server-sent events), GET /health, and with --allow-reload
POST /v1/reload (`keye.inference.reloading`). Requests are answered in
batches (`keye.inference.batching`). Everything that a client can make grow has a limit: connections, requests, bytes of
bodies, seconds until a request is complete. It is not built on `transformers serve`, which reads any file that a
request names and answers 500 for a clip that cannot be read; `for_transformers` lets that server load Keye models.
"""

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from keye.checks import integer
from keye.errors import KeyeError
from keye.inference.answerer import Answerer, is_local
from keye.inference.chat import load_model
from keye.inference.openai_format import Access
from keye.model.keye import KeyeForConditionalGeneration
from keye.video.fetch import UrlRules

KEY = "KEYE_API_KEY"


def serve(arguments: argparse.Namespace) -> int:
    """Run `keye serve` until it is interrupted."""
    from keye.inference.http_server import Limits, make_server
    from keye.inference.terminal import busy, quiet

    quiet()
    for name, least in (("batch", 1), ("queue", 0), ("max_bytes", 1), ("max_new_tokens", 1)):
        integer(f"--{name.replace('_', '-')}", getattr(arguments, name), least)
    root = Path(arguments.media_root) if arguments.media_root else None
    if root is not None and not root.is_dir():
        raise KeyeError(f"--media-root {root} is not a folder; give the folder of the clips")
    urls = UrlRules(max_bytes=arguments.max_bytes) if arguments.url else None
    access = Access(root, urls, arguments.max_bytes)
    key = api_key(arguments.api_key, arguments.api_key_file)
    reload_from = Path(arguments.allow_reload) if arguments.allow_reload else None
    if reload_from is not None and key is None:
        raise KeyeError(f"--allow-reload needs an API key, which its requests must send; set {KEY} or give a file")
    with busy(f"loading {arguments.model}"):
        model, processor = load_model(arguments.model, arguments.device, arguments.dtype, urls)
    name = arguments.name or arguments.model
    answerer = Answerer(model, processor, name, arguments.max_new_tokens, arguments.batch, arguments.queue)
    with make_server(answerer, access, arguments.host, arguments.port, key, Limits(), reload_from) as server:
        host, port = server.address
        print(f"{answerer.name} answers at http://{f'[{host}]' if ':' in host else host}:{port}/v1", flush=True)
        if not is_local(host) and key is None:
            warning = f"anyone who can reach {host}:{port} can send requests: set {KEY} or give --api-key-file"
            print(warning, file=sys.stderr, flush=True)
        with _ended_by_signals():
            server.run()
    return 0


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGINT and SIGTERM end the block: uvicorn ends the running requests and then raises the signal again."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            yield
    finally:
        signal.signal(signal.SIGTERM, before)


def api_key(given: str | None, path: str | None) -> str | None:
    """The key that requests must send: the given one, else that of a file, else of the environment; None for none.

    Raises:
        KeyeError: two keys are given, or one that a header cannot contain. An empty key is an error, not an open
            server.
    """
    if given is not None and path is not None:
        raise KeyeError("--api-key and --api-key-file exclude each other; give one of them")
    source, key = "--api-key", given
    if path is not None:
        try:
            source, key = path, Path(path).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise KeyeError(f"--api-key-file {path} cannot be read ({error}); give a text file") from error
    elif key is None:
        source, key = KEY, os.environ.get(KEY)
    if key is not None and (not key or key != key.strip() or not key.isprintable()):
        raise KeyeError(f"the key of {source} is empty or contains white space or control characters; give another")
    return key


def for_transformers() -> None:
    """Register Keye's model class for `transformers serve` (5.23), in this process; its loader uses its own names.

    Call it before `transformers.cli.transformers.main()`; the command line does not change.
    """
    from transformers import AutoModelForMultimodalLM
    from transformers.models.auto import modeling_auto

    config = KeyeForConditionalGeneration.config_class
    # The key lets the loader use the class below. With a class name as the value, it would also send audio.
    modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[config.model_type] = config.model_type
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[config.model_type] = KeyeForConditionalGeneration.__name__
    AutoModelForMultimodalLM.register(config, KeyeForConditionalGeneration, exist_ok=True)
