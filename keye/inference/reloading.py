"""New weights for a running server: those of a folder in one permitted directory, loaded between two replies.

A trainer writes its policy to `directory/<version>` and sends POST /v1/reload {"version": …}. New requests wait until
the replies in progress have ended and the weights are loaded, so that all tokens of a reply are of one version, which
the field `system_fingerprint` of the reply names. A folder whose weights do not fit changes nothing.
"""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from anyio import to_thread
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from torch import nn

from keye.checkpoint.convert import open_weights
from keye.checkpoint.shards import Stored
from keye.errors import CheckpointError
from keye.inference.answerer import Answerer
from keye.inference.http_limits import BodyReader
from keye.inference.openai_format import RequestError

RELOAD = "/v1/reload"
VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""The name of a folder without a path."""


class Reloading:
    """Loads the weights of `directory/<version>` into the model of an answerer; `directory` need not exist yet."""

    def __init__(self, answerer: Answerer, directory: Path) -> None:
        self.answerer, self.directory = answerer, directory

    def __call__(self, version: str) -> None:
        """Load a version after the replies in progress; nothing is read if the model has it already.

        Raises:
            RequestError: no such folder in `directory` (404, code no_version), or weights of another model or damaged
                ones (409).
        """
        engine = self.answerer.engine
        engine.between(lambda: self._load(version, self._folder(version)))

    def _folder(self, version: str) -> Path:
        """The folder of a version; a link to another place is refused."""
        if not VERSION.fullmatch(version):
            raise RequestError("version must be the name of a folder, without a path", param="version")
        folder = self.directory / version
        if folder.is_symlink() or any(path.is_symlink() for path in folder.glob("*")):
            raise RequestError(f"version {version} contains a link; write the files themselves", 403, "not_allowed")
        if not (folder / "config.json").is_file():
            raise RequestError(f"the folder of --allow-reload has no {version}", 404, "no_version")
        return folder

    def _load(self, version: str, folder: Path) -> None:
        """Runs in the engine's thread, without replies in progress."""
        engine = self.answerer.engine
        if engine.weights == version:
            return
        stored = _fitting(self.answerer.model, folder)
        engine.weights = None  # no request is answered with weights that are loaded in part
        for name, parameter in self.answerer.model.named_parameters():
            parameter.data.copy_(stored[name].mapped())
        engine.weights = version


def _fitting(model: nn.Module, folder: Path) -> dict[str, Stored]:
    """The tensors of a folder, not yet read; RequestError unless they are those of the model."""
    try:
        _, stored = open_weights(folder)
    except CheckpointError as error:
        raise RequestError(f"version {folder.name} cannot be loaded: {error}", 409, "damaged") from error
    if any(tensor.path.parent != folder for tensor in stored.values()):
        raise RequestError(f"the index of version {folder.name} names files outside of it", 403, "not_allowed")
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if wanted != {name: tuple(tensor.shape) for name, tensor in stored.items()}:
        raise RequestError(f"version {folder.name} has other tensors than the model that is served", 409, "other_model")
    return stored


def add_reload(app: FastAPI, load: Callable[[str], None], check: Callable[[Request], None], bodies: BodyReader) -> None:
    """Add POST /v1/reload. check: raises for a request that may not enter."""

    @app.post(RELOAD)
    async def reload(request: Request) -> Response:
        check(request)
        bodies.check(request)
        async with bodies.read(request) as body:
            version = _version(body)
        # The thread waits for replies, which a server that stops ends; the request itself need not wait for it.
        await to_thread.run_sync(partial(load, version), abandon_on_cancel=True)
        return JSONResponse({"version": version})


def _version(body: bytes) -> str:
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError("the body is not JSON") from error
    version = given.get("version") if isinstance(given, dict) else None
    if not isinstance(version, str):
        raise RequestError('the body has no version; send {"version": …}', param="version")
    return version
