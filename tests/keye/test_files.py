"""Files that are replaced as a whole: what a reader sees before, during and after a write, also one that fails."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from keye.files import atomic_file, write_atomically


def test_the_content_is_the_old_one_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "record.json"
    path.write_text("old")
    with atomic_file(path) as part:
        part.write_text("ne")
        assert path.read_text() == "old" and part.parent == tmp_path
        part.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_content_and_no_other_file(tmp_path):
    path = tmp_path / "record.json"
    write_atomically(path, "old, é")
    with pytest.raises(ValueError), atomic_file(path) as part:
        part.write_text("half")
        raise ValueError
    assert path.read_text(encoding="utf-8") == "old, é" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "half \ud800")
    assert path.read_text(encoding="utf-8") == "old, é" and list(tmp_path.iterdir()) == [path]


def test_a_killed_process_leaves_the_old_content(tmp_path):
    path = tmp_path / "record.json"
    path.write_text("old")
    code = f"""
import os, signal
from keye.files import atomic_file
with atomic_file({str(path)!r}) as part:
    part.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], env={**os.environ}, check=False)
    assert done.returncode == -signal.SIGKILL and path.read_text() == "old"


def test_writers_of_one_file_do_not_share_a_temporary_file(tmp_path):
    with atomic_file(tmp_path / "x") as one, atomic_file(tmp_path / "x") as other:
        assert one != other
        one.write_text("1")
        other.write_text("2")
    assert (tmp_path / "x").read_text() == "1"
