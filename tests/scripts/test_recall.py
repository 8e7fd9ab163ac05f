"""The recall bench: which changes count as seen, which slow frames as wasted, and equal numbers of slow frames."""

import itertools

import av
import numpy as np
import pytest
import torch

from keye.errors import KeyeError
from keye.world.render import write_mp4
from scripts.bench.encoder import recall_claims
from scripts.bench.encoder.media import continuity
from scripts.bench.encoder.media.scenes import Span
from scripts.bench.encoder.recall import (
    Sampled,
    Scores,
    Tally,
    chosen,
    evenly,
    measure_all,
    nuisance_frames,
    seen,
    spend_together,
)


class Level:
    """A measure with known scores: the difference of the means of two frames."""

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


def test_clips_are_chosen_by_name_or_kind():
    found = {"cuts-2": "a", "cuts-3": "b", "tree.avi": "c", "film with continuity": "d"}
    assert chosen(found, None) == ["a", "b", "c", "d"]
    assert chosen(found, ["cuts"]) == ["a", "b"]
    assert chosen(found, ["film with continuity", "cuts-3"]) == ["b", "d"]
    with pytest.raises(KeyeError, match=r"tree: there is no such clip here; name some of cuts, .*tree\.avi"):
        chosen(found, ["tree"])


class Released(Level):
    """Takes the released measure's name, for the tables."""

    name = "patch_cosine"


def test_a_clip_apart_is_reported_by_itself_and_not_among_all():
    def drawn() -> list[Sampled]:
        levels = [20] * 4 + [200] * 4 + [90] * 4
        one, other = (clip(levels, [Span("cut", 2.0, 2.0), Span("inner cut", 4.0, 4.0)]) for _ in range(2))
        other.name, other.apart = recall_claims.CONTINUITY, True
        return [one, other]

    measures = [Level(), Released()]
    both, alone = measure_all(drawn(), measures), measure_all(drawn()[:1], measures)
    assert both["all"] == alone["all"] == both["clip"]
    cuts = both[recall_claims.CONTINUITY]["default"]["level"]["changes"]
    assert cuts["all"] == {"seen": 2, "of": 2, "recall": 1.0} and cuts["inner cuts"]["of"] == cuts["cuts"]["of"] == 1
    only = {recall_claims.CONTINUITY: both[recall_claims.CONTINUITY]}
    assert recall_claims.claims(only) == []  # the default measure was not among those run
    *_, by_cut = recall_claims.tables(only, ["cuts"])
    assert ("default", "level", 3, "100%", "2 of 2", "1 of 1", "1 of 1") in by_cut.rows


# the film with continuity


def test_a_made_film_keeps_to_the_rules_of_its_design():
    for seed in range(5):
        shots = continuity.draw_film(5000, seed)
        assert shots[0].first == 0 and sum(shot.frames for shot in shots) == 5000
        assert [shot.first for shot in shots[1:]] == [shot.first + shot.frames for shot in shots[:-1]]
        assert all(25 <= shot.frames <= 325 for shot in shots)  # the last may take up to a second more
        scenes = [[shot for shot in shots if shot.scene == number] for number in range(shots[-1].scene + 1)]
        assert all(4 <= len(scene) <= 8 for scene in scenes[:-1])
        assert all(len({shot.place for shot in scene}) == 1 for scene in scenes)
        assert all(a[0].place != b[0].place for a, b in itertools.pairwise(scenes))
        for last, shot in itertools.pairwise(shots):
            if last.scene != shot.scene or last.stretch != shot.stretch:
                continue
            assert shot.at >= last.at + last.frames * last.speed + 5  # time goes on by 0.2 s at least
            if shot.crop[0] == last.crop[0]:
                free = 1 - shot.crop[0]
                moved = [abs(a - b) * free for a, b in zip(shot.crop[1:], last.crop[1:], strict=True)]
                assert max(moved) >= shot.crop[0] / 3 > 0 and shot.crop[0] < 1
    assert continuity.draw_film(5000, 1) == continuity.draw_film(5000, 1) != continuity.draw_film(5000, 2)


def test_what_comes_to_its_end_turns_back():
    assert [continuity.turning(i, 3) for i in range(9)] == [0, 1, 2, 1, 0, 1, 2, 1, 0]
    assert [continuity.turning(i, 1) for i in range(3)] == [0, 0, 0]


def test_a_made_film_shows_what_its_record_says_and_jumps_only_at_its_cuts(tmp_path):
    # The source brightens by one level a frame and by 100 from left to right: its middle is 60 + frame, its left 10.
    ramp = np.linspace(-50, 50, 160)[None, :, None].repeat(90, 0).repeat(3, 2)
    frames = [np.rint(60 + number + ramp).clip(0, 255).astype(np.uint8) for number in range(48)]
    write_mp4(tmp_path / "source.mp4", frames, 24, 8)
    early, late = (0.0, 0.5), (1.0, 1.5)  # frames 0 to 11, 24 to 35
    shots = [
        continuity.SubShot(0, 10, 0, "a", early, 8, 1.0, (1.0, 0.0, 0.0), False),
        continuity.SubShot(10, 10, 0, "a", early, 0, 0.5, (0.4, 1.0, 0.5), False),
        continuity.SubShot(20, 10, 0, "a", late, 0, 1.0, (0.4, 1.0, 0.5), True),
        continuity.SubShot(30, 10, 1, "b", late, 11, 1.0, (0.4, 0.0, 0.0), False),
    ]
    path = tmp_path / "film.mp4"
    continuity.render(tmp_path / "source.mp4", path, shots, (90, 160))
    assert continuity.cuts(path) == [(0.4, True), (0.8, True), (1.2, False)]
    with av.open(str(path)) as container:
        shown = [frame.to_ndarray(format="rgb24").astype(float) for frame in container.decode(video=0)]
    # The window of 0.4 at the right is brighter by 30 in its middle than the whole, that at the left darker by 30.
    turned = [*range(8, 12), *range(10, 4, -1)]  # to the last of 12 frames and back
    expected = [60 + number for number in turned]
    expected += [90 + number // 2 for number in range(10)]
    expected += [90 + 24 + number for number in range(10)]
    expected += [30 + 24 + number for number in range(11, 1, -1)]
    assert len(shown) == 40
    for picture, level in zip(shown, expected, strict=True):
        assert picture.mean() == pytest.approx(level, abs=4)
    rising = [picture[:, -20:].mean() > picture[:, :20].mean() for picture in shown]
    assert rising == [True] * 20 + [False] * 10 + [True] * 10  # the third is mirrored
