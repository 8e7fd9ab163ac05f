"""The structure is that of docs/architecture.md: no import cycles, imports in one direction, existing files."""

import re
from pathlib import Path

from scripts.bench.layout import circle, imports

ROOT = Path(__file__).resolve().parents[2]
ORDER = ("keye", "stages", "rl", "scripts")


def test_no_files_import_each_other():
    assert circle(imports(ROOT)) == []


def test_a_circle_is_found():
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"b"}})) == {"b", "c"}


def test_imports_point_down_only():
    for module, found in imports(ROOT).items():
        level = ORDER.index(module.split(".")[0])
        above = [name for name in found if ORDER.index(name.split(".")[0]) > level]
        assert not above, f"{module} imports {above}"


def test_no_product_file_imports_the_tests():
    for path in (path for package in ORDER for path in (ROOT / package).rglob("*.py")):
        assert not re.search(r"^\s*(from|import) tests\b", path.read_text(encoding="utf-8"), re.MULTILINE), path


def test_only_the_bootstrap_of_the_scripts_puts_the_checkout_on_the_path():
    scripts = (ROOT / "scripts").glob("*.py")
    assert [path.name for path in scripts if "sys.path.insert" in path.read_text(encoding="utf-8")] == ["checkout.py"]


def test_files_that_the_documents_name_exist():
    """`file.py` after `folder/other.py` in one cell is in the same folder."""
    guides = ("architecture", "decisions", "encoder", "model", "stages")
    for document in (ROOT / "README.md", *(ROOT / f"docs/{name}.md" for name in guides)):
        for line in document.read_text(encoding="utf-8").splitlines():
            folder = Path()
            for name in re.findall(r"`([\w/]+\.py)`", line):
                folder = Path(name).parent if "/" in name else folder
                places = [folder / Path(name).name, Path(name)]
                assert any((ROOT / place).is_file() for place in places), f"{document.name}: {name}"
