"""Results by rank, the first exception, and the timeout."""

import os
import sys
import time

import pytest
import torch
import torch.distributed as dist

from keye.errors import RecipeError
from tests.distributed import run_distributed


def sum_of_ranks(offset: int) -> tuple[int, float]:
    value = torch.tensor(float(dist.get_rank() + offset))
    dist.all_reduce(value)
    return dist.get_rank(), value.item()


def seen_environment() -> tuple[str, str | None]:
    return os.environ["KEYE_SEEN"], os.environ.get("KEYE_GONE")


def printed(text: str) -> None:
    print(text, flush=True)
    print(f"{text} too", file=sys.stderr, flush=True)


def fail_on_one() -> None:
    if dist.get_rank() == 1:
        raise RecipeError("the reason")
    dist.barrier()


def sleep_on_one() -> None:
    if dist.get_rank() == 1:
        time.sleep(600)


def test_results_come_back_by_rank():
    assert run_distributed(sum_of_ranks, 2, 60, 5) == [(0, 11.0), (1, 11.0)]


def test_ranks_have_the_environment_of_their_call(monkeypatch):
    monkeypatch.setenv("KEYE_SEEN", "first")
    monkeypatch.setenv("KEYE_GONE", "here")
    assert run_distributed(seen_environment, 1, 60) == [("first", "here")]
    monkeypatch.setenv("KEYE_SEEN", "second")
    monkeypatch.delenv("KEYE_GONE")
    assert run_distributed(seen_environment, 1, 60) == [("second", None)]


def test_what_ranks_print_goes_where_the_caller_prints(capfd):
    for text in ("one", "two"):
        run_distributed(printed, 1, 60, text)
        said = capfd.readouterr()
        assert (said.out, said.err) == (f"{text}\n", f"{text} too\n")


def test_first_exception_is_raised_as_it_was():
    with pytest.raises(RecipeError, match="the reason") as caught:
        run_distributed(fail_on_one, 2, 60)
    assert "on rank 1" in caught.value.__notes__[0]


def test_time_limit_ends_what_hangs():
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"\[0, 1\] of 2|\[1\] of 2") as caught:
        run_distributed(sleep_on_one, 2, 6)
    [note] = [note for note in caught.value.__notes__ if note.startswith("rank 1: ")]
    assert "in sleep_on_one" in note or note == "rank 1: it had not begun"
    assert time.monotonic() - started < 30
