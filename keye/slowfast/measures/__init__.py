"""Similarity measures between frames; every score is in [0, 1] and never NaN.

A measure turns frames into features (`prepare`, batched, once per frame) and compares many frames with one reference
(`compare`). The package's measures are in `change` (the default), `pixelwise` and `packets`, which reads the packets of
a file instead of its frames. `register` adds your own under a name for recipes and the command line.
"""

from keye.checks import fraction
from keye.errors import KeyeError
from keye.slowfast.measures import change, packets, pixelwise  # noqa: F401  (they register their measures)
from keye.slowfast.measures.base import REGISTRY, Measure, register

__all__ = ["Measure", "as_measure", "get_measure", "known_measures", "register"]


def known_measures() -> list[str]:
    """The names that `get_measure` accepts."""
    return sorted(REGISTRY)


def get_measure(name: str) -> Measure:
    """The measure registered as `name`.

    Raises:
        KeyeError: the name is unknown; the message lists the known names.
    """
    if name not in REGISTRY:
        raise KeyeError(f"similarity measure {name!r} is not known; use one of {', '.join(known_measures())}")
    return REGISTRY[name]()


def as_measure(measure: str | Measure) -> Measure:
    """The measure of a name, or a measure object itself.

    Raises:
        KeyeError: the name is unknown, or the object is not a measure; the message says what it lacks.
    """
    if isinstance(measure, str):
        return get_measure(measure)
    if isinstance(measure, type):
        raise KeyeError(f"measure is the class {measure.__name__}; give an instance of it: {measure.__name__}(…)")
    for name in ("prepare", "compare"):
        if not callable(getattr(measure, name, None)):
            raise KeyeError(
                f"measure is {measure!r:.80}, which has no method {name}; give a name or an object with the methods of"
                " keye.slowfast.measures.Measure"
            )
    if not isinstance(getattr(measure, "name", None), str):
        raise KeyeError(f"the measure {type(measure).__name__} has no name; give its class an attribute `name`")
    fraction(f"threshold of the measure {measure.name!r}", getattr(measure, "threshold", None))
    return measure
