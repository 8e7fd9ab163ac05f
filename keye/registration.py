"""Registers Keye with transformers' Auto classes on `import keye`, without importing transformers.

transformers has no entry points: a package registers its classes by running code. For Keye this is the import of
`keye.model.config` and `keye.processor.processor`, which follows the import of transformers' registries, before or
after `import keye`. A finder in `sys.meta_path` is the only way to run code after another package's module is loaded.
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
    # If this registry imports the one above, no config of a decoder can be imported before this one is complete.
    f"{_AUTO}modeling_auto": "keye.model.config",
    f"{_AUTO}processing_auto": "keye.processor.processor",
}


def register() -> None:
    """Register with the registries that are loaded now, and with the others when they are loaded."""
    if not any(isinstance(finder, _Follower) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Follower())
    for registry in _REGISTERED_BY:
        if registry in sys.modules:
            _follow(registry)


def _follow(registry: str) -> None:
    # Without av, or with an incompatible transformers, `import transformers` must still work; importing a class of Keye
    # then raises the error.
    with contextlib.suppress(ImportError):
        importlib.import_module(_REGISTERED_BY[registry])


class _Follower(MetaPathFinder):
    """Finds transformers' registries like the default finder, and runs Keye's registration after each."""

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
