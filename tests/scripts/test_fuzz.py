"""The fuzz bench detects every failure of a worker, and its damage is reproducible."""

import json
import sys

import pytest

from scripts.bench.encoder import fuzz
from scripts.bench.encoder.fuzz import State, Worker, plan_one
from scripts.bench.encoder.media import mutations
from tests.keye.video.make import numbered, write_video

# Answers each line with a line; misbehaves on request.
WORKER = """
import json, os, signal, sys, time
print(json.dumps({"outcome": "ready"}), flush=True)
for line in sys.stdin:
    if line == "1\\n":
        os.kill(os.getpid(), signal.SIGSEGV)
    if line == "2\\n":
        while True:
            pass
    if line == "3\\n":
        time.sleep(60)
    print(json.dumps({"outcome": "planned", "damage": "bits", "file": "a.mp4"}), flush=True)
"""


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "KEPT", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("index", "outcome", "detail"),
    [(0, "planned", None), (1, "crash", "exit code -11"), (2, "hang", ""), (3, "hang", "")],
)
def test_crashes_and_hangs_are_seen_from_outside(kept, index, outcome, detail):
    worker = Worker([sys.executable, "-c", WORKER])
    assert worker.ready and worker.plan(0)["outcome"] == "planned"
    found = worker.plan(index, stuck=1.0, hang=0.3)
    worker.close()
    assert (found["outcome"], found["index"]) == (outcome, index) and (detail is None or detail in found["detail"])
    assert worker.process.poll() is not None


def test_a_worker_that_does_not_start_is_no_worker(kept):
    worker = Worker([sys.executable, "-c", "raise SystemExit(3)"])
    worker.close()
    assert not worker.ready


def test_faults_are_counted_and_their_files_kept(kept, monkeypatch):
    files = [kept / "a.mp4", kept / "b.gif"]
    for path, content in zip(files, (b"a" * 500, b"b" * 500), strict=True):
        path.write_bytes(content)
    monkeypatch.setattr(fuzz, "seed_files", lambda folder: files)
    state = State(seed=5, files=4)
    which, damaged, damage = mutations.mutate([path.read_bytes() for path in files], 5, 2)
    found = [
        {"index": 0, "outcome": "planned", "seconds": 0.5, "damage": "bits+zeros", "file": "a.mp4", "detail": ""},
        {"index": 1, "outcome": "refused", "seconds": 0.1, "damage": "bits", "file": "a.mp4", "detail": "torn"},
        {"index": 2, "outcome": "crash", "detail": "exit code -11"},
        {"outcome": "memory", "grown": 60 << 20, "peak": 1 << 30},
    ]
    fuzz._note(state, 0, found)
    assert state.outcomes == {"planned": 1, "refused": 1, "crash": 1, "leak": 1}
    assert state.slowest == 0.5 and state.peak == 1 << 30 and state.batches == [0]
    crash, leak = state.faults
    assert leak["outcome"] == "leak" and leak["detail"] == "60 MB"
    assert crash["file"] == files[which].name and crash["damage"] == damage
    assert (kept / crash["kept"]).read_bytes() == damaged
    fuzz.publish(state, kept / "out", quick=False)
    claims = json.loads((kept / "out" / "fuzz.json").read_text())["claims"]
    # A fault is one at any number of files; that there is none is only shown by all of them.
    assert [claim["met"] for claim in claims] == [False, None, None, None, False]


def test_damage_is_the_same_for_the_same_index_and_of_every_kind():
    files = [bytes(range(256)) * 20, b"another file" * 100]
    first = [mutations.mutate(files, 3, index) for index in range(300)]
    assert first == [mutations.mutate(files, 3, index) for index in range(300)]
    assert first != [mutations.mutate(files, 4, index) for index in range(300)]
    assert sum(content != files[which] for which, content, _ in first) > 290
    assert {kind for _, _, done in first for kind in done.split("+")} == set(mutations._DAMAGE)


def test_what_becomes_of_a_file(kept):
    content = write_video(kept / "a.mp4", numbered(20), rate=10).read_bytes()
    for way in range(8):
        assert plan_one(content, "a.mp4", way) == {"outcome": "planned", "detail": ""}
    assert plan_one(content[:200], "a.mp4", 0)["outcome"] == "refused"
    assert [path.name for path in kept.iterdir()] == ["a.mp4"]
