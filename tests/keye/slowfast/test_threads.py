"""The number of torch's threads as seen by the caller, by its other threads and by threads that start meanwhile."""

import threading

import pytest
import torch

from keye.encoded import encode_patches
from keye.encoder import SlowFastEncoder
from keye.slowfast.measures.pixelwise import MSE
from keye.slowfast.pixels import PixelFormat

THREADS = 3


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


def in_a_new_thread(work):
    found = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join(30)
    return found[0]


def frames(count=6):
    return torch.randint(0, 256, (count, 3, 60, 80), dtype=torch.uint8)


class Watching(MSE):
    """Records the numbers of threads while frames are scored."""

    name = "watching"

    def __init__(self):
        self.inside, self.new = set(), set()

    def prepare(self, pictures):
        self.inside.add(torch.get_num_threads())
        self.new.add(in_a_new_thread(torch.get_num_threads))
        return super().prepare(pictures)


def test_a_thread_that_starts_while_frames_are_scored_keeps_all_of_torchs_threads():
    measure = Watching()
    SlowFastEncoder(measure=measure).plan(frames())
    assert measure.inside == {1}  # scoring runs in this thread only
    assert measure.new == {THREADS}
    assert torch.get_num_threads() == in_a_new_thread(torch.get_num_threads) == THREADS


def test_frames_are_resized_and_cut_without_threads_that_spin():
    """Decoding needs the cores at the same time."""
    seen = []

    def decoded():
        for frame in frames(3):
            seen.append(torch.get_num_threads())
            yield frame

    encode_patches(decoded(), [(56, 84)] * 3, 28, PixelFormat())
    assert seen == [1, 1, 1] and torch.get_num_threads() == THREADS


def test_overlapping_plans_restore_the_number():
    """Two threads inside at the same time, entering and leaving in every order."""
    encoder = SlowFastEncoder(measure="mse")
    start, seen = threading.Barrier(4), []

    def work():
        start.wait(30)
        for _ in range(25):
            encoder.plan(frames())
            seen.append(torch.get_num_threads())

    for _ in range(3):
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert set(seen) == {THREADS}
    assert torch.get_num_threads() == in_a_new_thread(torch.get_num_threads) == THREADS


def test_an_error_and_a_plan_within_a_plan_restore_the_number():
    class Broken(MSE):
        name = "broken"

        def prepare(self, pictures):
            SlowFastEncoder(measure="mse").plan(frames())
            assert torch.get_num_threads() == 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        SlowFastEncoder(measure=Broken()).plan(frames())
    assert torch.get_num_threads() == THREADS
