"""Threads that decode ahead: their exceptions, their end with their reader, and with the program."""

import subprocess
import sys
import threading

import pytest

from keye.errors import VideoError
from keye.video.decoding.prefetch import Prefetcher
from scripts.clips import clip


def test_an_exception_in_the_thread_is_raised_in_the_reader():
    def items():
        yield 1
        raise VideoError("the second is broken")

    ahead = Prefetcher(items(), 2, threading.Event())
    assert next(ahead) == 1
    with pytest.raises(VideoError, match="the second is broken"):
        next(ahead)
    assert next(ahead, None) is None


def test_threads_have_ended_when_the_interpreter_does():
    """Handlers run last in, first out: the one of this script sees what those of the package have left."""
    script = """
import atexit, threading, time
atexit.register(lambda: print([t.name for t in threading.enumerate()]))
from keye.video.decoding.prefetch import Prefetcher
def items():
    while True:
        time.sleep(0.1)
        yield 1
kept = Prefetcher(items(), 2, threading.Event())
print(next(kept))
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout.split("\n")[:2]) == (0, ["1", "['MainThread']"]), ended.stderr


def test_every_close_waits_until_the_thread_has_ended():
    """The second caller frees what the generator uses: a container that is closed while it is read is a crash."""
    inside, leave, halt = threading.Event(), threading.Event(), threading.Event()

    def items():
        yield 0
        inside.set()
        leave.wait()

    ahead = Prefetcher(items(), 2, halt)
    assert next(ahead) == 0 and inside.wait(30)
    first, second = threading.Thread(target=ahead.close), threading.Thread(target=ahead.close)
    first.start()
    assert halt.wait(30)  # the first is closing it
    second.start()
    second.join(0.3)
    early = not second.is_alive()
    leave.set()
    first.join(30)
    second.join(30)
    assert not early and not first.is_alive() and not second.is_alive()


def test_the_end_of_the_program_waits_for_a_daemon_that_reads(tmp_path):
    """Ended inside PyAV or torch it would abort the process: "terminate called without an active exception".

    Each program is a fork of one that has imported all it needs and has no thread.
    """
    script = """
import os, sys, threading, time
from keye import SlowFastEncoder
import keye.video.clip, torch
for wait in (0.0, 0.1, 0.23, 0.4):
    if not (process := os.fork()):
        break
    if code := os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]):
        sys.exit(f"after {wait} s the program ends with code {code}")
else:
    sys.exit()
def work():
    encoder = SlowFastEncoder(fps=25.0)
    while True:
        encoder.plan(sys.argv[1])
        read.set()
read = threading.Event()
threading.Thread(target=work, daemon=True).start()
read.wait()
time.sleep(wait)
"""
    arguments = [sys.executable, "-c", script, str(clip("bigbuckbunny.mp4"))]
    ended = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_the_end_of_the_program_waits_for_a_daemon_between_two_clips():
    """It may be inside torch there; it ends in Python, where it begins to read the next clip."""
    script = """
import sys, threading, time
from keye.video.decoding.prefetch import reading
def work():
    try:
        while True:
            with reading():
                pass
            read.set()
            time.sleep(0.1)
    finally:
        print("ended")
read = threading.Event()
threading.Thread(target=work, daemon=True).start()
read.wait()
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "ended\n", "")


def test_a_clip_left_open_ends_with_the_program(tmp_path):
    script = """
import sys
from keye.video.clip import open_clip
clip = open_clip(sys.argv[1], 25.0, 1000)
frames = iter(clip.__enter__())
next(frames)
sys.modules["kept"] = (clip, frames)
"""
    arguments = [sys.executable, "-c", script, str(clip("bikes.mp4"))]
    ended = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, "")
