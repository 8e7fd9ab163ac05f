"""The recall bench itself: what counts as seen, as wasted and as the same number of slow frames."""

import pytest
import torch

from scripts.bench.recall import Sampled, Scores, Tally, evenly, nuisance_frames, seen, spend_together
from scripts.bench.scenes import Span


class Level:
    """How near the means of two frames are: made up, so that scores are known."""

    name, threshold = "level", 0.9

    def prepare(self, frames: torch.Tensor) -> torch.Tensor:
        return frames.float().mean((1, 2, 3))

    def compare(self, reference: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return 1 - (features - reference).abs() / 255


def clip(levels: list[int], events: list[Span] = (), nuisances: list[Span] = ()) -> Sampled:
    frames = torch.tensor(levels, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)
    return Sampled("clip", [i / 2 for i in range(len(levels))], frames, list(events), list(nuisances))


def test_a_change_is_seen_by_a_new_slow_frame_at_it_or_soon_after():
    changes = [Span("cut", 1.2, 1.2), Span("dissolve", 3.0, 4.0), Span("cut", 6.6, 6.6)]
    one = clip([0] * 16, changes)
    assert seen(one, [0]) == [False] * 3  # the first frame is slow anyway and sees nothing
    assert seen(one, [0, 2]) == [False] * 3  # 1.0 s is before the cut
    assert seen(one, [0, 3, 9]) == [True, True, False]  # 1.5 s; 4.5 s, half a second after the dissolve
    assert seen(one, [0, 4, 10, 15]) == [False, False, False]  # 2.0, 5.0 and 7.5 s are too late


def test_thresholds_spend_what_is_asked_for_where_they_can():
    levels = [0, 0, 50, 50, 60, 60, 200, 200]
    scores = Scores(Level(), clip(levels).frames)
    assert scores.walk(0.9) == [0, 2, 6]
    assert scores.spend(1) == [0]
    assert scores.spend(2) == [0, 6]
    assert scores.spend(4) == [0, 2, 4, 6]
    assert scores.spend(8) == [0, 2, 4, 6]  # equal frames are never slow
    still = Scores(Level(), clip([7] * 8).frames)
    assert still.spend(3) == [0]
    assert spend_together([scores, still], 4 / 16) == [[0, 2, 6], [0]]


def test_only_nuisances_far_from_changes_are_wasted():
    one = clip([0] * 10, [Span("object", 1.0, 1.0)], [Span("light", 0.0, 4.0)])
    assert nuisance_frames(one) == {1, 6, 7, 8}  # 0.5 s, and from 3.0 s to 4.0 s
    tally = Tally()
    tally.add(one, [0, 2, 7, 9])
    result = tally.result()
    assert result["wasted"] == pytest.approx(1 / 4) and result["share"] == 0.4
    assert result["changes"]["small"] == result["changes"]["all"] == {"seen": 1, "of": 1, "recall": 1.0}


def test_even_frames():
    assert evenly(3, 9) == [0, 3, 6]
    assert evenly(1, 5) == [0]
