"""How alike two frames are: one small protocol, several measures, every score in [0, 1] and never NaN.

A measure first turns frames into features (`prepare`, batched, once per frame) and then scores one reference against
many (`compare`). `register` adds your own under a name that recipes and the command line can use; those that come with
the package are in `change` (the default) and `pixelwise`.
"""

from keye.checks import share
from keye.errors import KeyeError
from keye.slowfast.measures import change, pixelwise  # noqa: F401  (they register their measures)
from keye.slowfast.measures.base import REGISTRY, Measure, register

__all__ = ["Measure", "as_measure", "get_measure", "known_measures", "register"]


def known_measures() -> list[str]:
    """The names `get_measure` knows."""
    return sorted(REGISTRY)


def get_measure(name: str) -> Measure:
    """The measure registered as `name`; an unknown name is a KeyeError that lists the known ones."""
    if name not in REGISTRY:
        raise KeyeError(f"similarity measure {name!r} is not known; use one of {', '.join(known_measures())}")
    return REGISTRY[name]()


def as_measure(given: str | Measure) -> Measure:
    """The measure that `given` names or is; KeyeError says what is missing of an object that is none."""
    if isinstance(given, str):
        return get_measure(given)
    if isinstance(given, type):
        raise KeyeError(f"measure is the class {given.__name__}; give an instance of it: {given.__name__}(…)")
    for name in ("prepare", "compare"):
        if not callable(getattr(given, name, None)):
            raise KeyeError(
                f"measure is {given!r:.80}, which has no method {name}; give a name or an object with the methods of"
                " keye.slowfast.measures.Measure"
            )
    if not isinstance(getattr(given, "name", None), str):
        raise KeyeError(f"the measure {type(given).__name__} has no name; give its class an attribute `name`")
    share(f"threshold of the measure {given.name!r}", getattr(given, "threshold", None))
    return given
