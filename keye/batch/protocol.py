"""The protocol of an encoder that the cache and the workers use."""

from typing import Any, Protocol

import torch

from keye.encoded import EncodedVideo
from keye.slowfast.plan import VideoPlan


class Encoder(Protocol):
    """The part of `keye.SlowFastEncoder` that encoding many videos uses; see there."""

    measure: Any
    policy: Any
    tower: torch.nn.Module | None

    @property
    def settings(self) -> dict: ...
    def plan(self, source: object, **options: Any) -> VideoPlan: ...
    def __call__(self, source: object, **options: Any) -> EncodedVideo: ...
