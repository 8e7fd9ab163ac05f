"""Keye: an adaptive slow-fast video encoder and the video-language model that reads it.

Names are loaded when they are first used, so that `from keye import SlowFastEncoder` needs neither transformers nor
deepspeed.
"""

import importlib

from keye.errors import missing_package
from keye.registration import register

__version__ = "0.1.0"

_WHERE = {
    "SlowFastEncoder": "keye.encoder",
    "EncodedVideo": "keye.encoded",
    "VideoPlan": "keye.slowfast.plan",
    "KeyeConfig": "keye.model.config",
    "KeyeForConditionalGeneration": "keye.model.keye",
    "KeyeProcessor": "keye.processor.processor",
}
__all__ = list(_WHERE)

register()


def __getattr__(name: str) -> object:
    if name in _WHERE:
        try:
            return getattr(importlib.import_module(_WHERE[name]), name)
        except ModuleNotFoundError as error:
            missing = missing_package(error)
            if missing is None:
                raise
            raise ModuleNotFoundError(f"keye.{name} needs a package: {missing}", name=error.name) from None
    raise AttributeError(f"module 'keye' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
