"""transformers' own common tests, from the sdist of the installed release, to be run with Keye's classes.

The sdist holds the mixins of models and processors, but not those of generation and export, which stand in folders of
their own; tests/keye/model/test_transformers_api.py covers what these would check. Nothing of it is kept in this
repository: it is downloaded when a test asks for it.
"""

import importlib
import subprocess
import sys
import tarfile
import unittest
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest
import transformers

CACHE = Path(__file__).parents[3] / ".cache"
PACKAGE = "transformers_own_tests"
# What the mixins import and the sdist does not hold, with the names that they take from it.
ABSENT = {
    f"{PACKAGE}.exporters.test_export": "ExportTesterMixin",
    f"{PACKAGE}.generation.test_utils": "GenerationTesterMixin",
}


def load(name: str) -> ModuleType:
    """A module of transformers' tests; the test is skipped if the sdist is not available."""
    pytest.importorskip("parameterized", reason="transformers' tests need it; the extra dev brings it")
    folder = _folder()
    if PACKAGE not in sys.modules:
        package = ModuleType(PACKAGE)
        package.__path__ = [str(folder / "tests")]
        sys.modules[PACKAGE] = package
        for path, attribute in ABSENT.items():
            sys.modules.setdefault(path.rpartition(".")[0], ModuleType(path.rpartition(".")[0]))
            sys.modules[path] = ModuleType(path)
            setattr(sys.modules[path], attribute, type(attribute, (), {}))
        fetch = ModuleType("fetch_hub_objects_for_ci")
        fetch.url_to_local_path = lambda url: url
        sys.modules[fetch.__name__] = fetch
    return importlib.import_module(f"{PACKAGE}.{name}")


def _folder() -> Path:
    """The unpacked sdist of the installed transformers."""
    version = transformers.__version__
    folder = CACHE / f"transformers-{version}"
    if not (folder / "tests").is_dir():
        CACHE.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--quiet"]
        try:
            subprocess.run(
                [*command, f"transformers=={version}", "-d", str(CACHE)], check=True, timeout=240, capture_output=True
            )
            with tarfile.open(CACHE / f"transformers-{version}.tar.gz") as archive:
                archive.extractall(CACHE, filter="data")
        except (subprocess.SubprocessError, OSError, tarfile.TarError) as error:
            pytest.skip(f"the sdist of transformers {version} cannot be downloaded ({error})")
    return folder


def outcome(case: type[unittest.TestCase], reasons: Mapping[str, str]) -> None:
    """Run all tests of a case; none may fail, and each that is skipped must be for one of the `reasons`.

    reasons: parts of the messages with which tests are skipped, and why that is right for Keye.
    """
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(case).run(result)
    broken = [*result.failures, *result.errors]
    failed = [f"{test.id().partition('.Keye')[2]}: {trace.strip().splitlines()[-1]}" for test, trace in broken]
    skipped = {test.id().rpartition(".")[2]: reason for test, reason in result.skipped}
    unknown = {test: reason for test, reason in skipped.items() if not any(part in reason for part in reasons)}
    passed = result.testsRun - len(failed) - len(skipped)
    print(f"{passed} passed, {len(failed)} failed, {len(skipped)} skipped")
    for test, reason in sorted(skipped.items()):
        print(f"  skipped {test}: {reason}")
    assert not failed, "\n".join(failed)
    assert not unknown, f"skipped for a reason that nobody has judged: {unknown}"
    assert passed > 0
