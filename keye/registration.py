"""`import keye` is enough for transformers' Auto classes to know Keye's, and still loads nothing of transformers.

transformers has no place where a package could name its classes: they are registered by code that runs. That code is
in `keye.model.config` and `keye.processor.processor`, and it runs when transformers' own registries are loaded,
whenever that is: before `import keye` or after it.
"""

import contextlib
import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_AUTO = "transformers.models.auto."
_REGISTERED_BY = {
    f"{_AUTO}configuration_auto": "keye.model.config",
    # Where this registry begins to load the one above, no config of a decoder can be imported before its own end.
    f"{_AUTO}modeling_auto": "keye.model.config",
    f"{_AUTO}processing_auto": "keye.processor.processor",
}


def register() -> None:
    """Register what can be registered now, and the rest as soon as its registry is loaded."""
    if not any(isinstance(finder, _Follower) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Follower())
    for registry in _REGISTERED_BY:
        if registry in sys.modules:
            _follow(registry)


def _follow(registry: str) -> None:
    # Someone who has no av, or another transformers, must still be able to import transformers; who then asks for a
    # class of Keye's by its name is told what is missing.
    with contextlib.suppress(ImportError):
        importlib.import_module(_REGISTERED_BY[registry])


class _Follower(MetaPathFinder):
    """Finds modules as ever, and lets the registries be followed by what registers with them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _REGISTERED_BY:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_follow(module: ModuleType) -> None:
            run(module)
            _follow(fullname)

        spec.loader.exec_module = run_and_follow
        return spec
