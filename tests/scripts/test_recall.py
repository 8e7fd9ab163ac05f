"""The recall bench: which changes count as seen, which slow frames as wasted, and equal numbers of slow frames."""

import itertools

import av
import numpy as np
import pytest
import torch

from keye.errors import KeyeError
from keye.world.render import write_mp4
from scripts.bench.common.intervals import paired_interval
from scripts.bench.encoder import recall_claims
from scripts.bench.encoder.media import continuity
from scripts.bench.encoder.media.changes import CONTINUITY
from scripts.bench.encoder.media.pages import PageDrawing
from scripts.bench.encoder.media.scenes import Span
from scripts.bench.encoder.recall import Sampled, Scores, chosen, measure_all, spend_together
from scripts.bench.encoder.recall_tally import Tally, evenly, nuisance_frames, randomly, seen, unit_of


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
    assert result["hits"] == [1.0] and result["units"] == ["clip"] and result["wasted_by_unit"] == {"clip": [1, 4]}
    both = Tally()
    both.add(one, [0, 2], [0, 5, 7])  # the mean of two draws
    result = both.result()
    assert result["changes"]["all"]["recall"] == 0.5 and result["wasted"] == pytest.approx(1 / 8)


def test_even_frames():
    assert evenly(3, 9) == [0, 3, 6]
    assert evenly(1, 5) == [0]


def test_random_frames_are_as_many_and_differ_by_seed():
    draws = randomly(4, 30)
    assert draws == randomly(4, 30) and len({tuple(draw) for draw in draws}) == len(draws) == 5
    assert all(len(set(draw)) == 4 and draw[0] == 0 and draw == sorted(draw) and draw[-1] < 30 for draw in draws)
    assert randomly(1, 30) == [[0]] * 5 and randomly(30, 30)[0] == list(range(30))


def test_intervals_draw_units_as_a_whole():
    assert paired_interval(np.zeros(9)) == (0, 0)
    low, high = paired_interval(np.array([1.0, -1.0] * 200))
    assert -0.15 < low < -0.05 and 0.05 < high < 0.15  # 1.96 / sqrt(400)
    low, high = paired_interval(np.array([1.0] * 200 + [-1.0] * 200), ["a"] * 200 + ["b"] * 200)
    assert (low, high) == (-1, 1)  # two units: half of all draws hold only one of them
    assert paired_interval(np.array([2.0, 1.0]), ["a", "b"], np.array([4, 2])) == (0.5, 0.5)
    long = clip([0] * 200)
    assert [unit_of(long, moment) for moment in (0, 29.9, 30, 99)] == ["clip 0", "clip 0", "clip 1", "clip 3"]
    assert unit_of(clip([0] * 20), 9) == "clip"


def test_clips_are_chosen_by_name_or_kind():
    found = {"cuts-2": "a", "cuts-3": "b", "tree.avi": "c", "film with continuity": "d"}
    assert chosen(found, None) == found
    assert list(chosen(found, ["cuts"])) == ["cuts-2", "cuts-3"]
    assert list(chosen(found, ["film with continuity", "cuts-3"])) == ["cuts-3", "film with continuity"]
    with pytest.raises(KeyeError, match=r"tree: there is no such clip here; name some of cuts, .*tree\.avi"):
        chosen(found, ["tree"])


class Released(Level):
    """Takes the released measure's name, for the tables."""

    name = "patch_cosine"


class Rival(Level):
    name = "mse"


def drawn() -> dict:
    levels = [20] * 4 + [200] * 4 + [90] * 4
    one, other = (clip(levels, [Span("cut", 2.0, 2.0), Span("inner cut", 4.0, 4.0)]) for _ in range(2))
    other.name, other.apart = CONTINUITY, True
    return {one.name: lambda: one, other.name: lambda: other}


def test_a_clip_apart_is_reported_by_itself_and_not_among_all():
    measures = [Level(), Released()]
    makers = drawn()
    both, alone = measure_all(makers, measures), measure_all({"clip": makers["clip"]}, measures)
    assert both["all"] == alone["all"] == both["clip"] and both["films"] == both[CONTINUITY]
    cuts = both[CONTINUITY]["default"]["level"]["changes"]
    assert cuts["all"] == {"seen": 2, "of": 2, "recall": 1.0} and cuts["inner cuts"]["of"] == cuts["cuts"]["of"] == 1
    only = {CONTINUITY: both[CONTINUITY]}
    assert recall_claims.claims(only) == []  # the default measure was not among those run
    *_, by_cut = recall_claims.tables(only)
    assert ("default", "level", 3, "100%", "2 of 2", "1 of 1", "1 of 1", "–") in by_cut.rows


def test_uniform_and_random_have_as_many_slow_frames_at_every_setting():
    results = measure_all(drawn(), [Level(), Released(), Rival()])
    for settings in results.values():
        for setting, measures in settings.items():
            assert {"uniform", "random", "level", "patch_cosine", "mse"} == set(measures)
            assert measures["uniform"]["slow"] == measures["random"]["slow"]
            if setting == "default":
                assert measures["uniform"]["slow"] == measures["level"]["slow"] == 3


def test_what_was_judged_is_taken_again_and_only_new_measures_run(tmp_path):
    makers = drawn()
    first = measure_all(makers, [Level()], tmp_path)
    judged = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert set(judged) == {"clip.json", f"{CONTINUITY}.json"}
    again = measure_all(makers, [Level()], tmp_path)
    assert again == first and {path.name: path.read_text() for path in tmp_path.iterdir()} == judged
    more = measure_all(makers, [Level(), Rival()], tmp_path)
    assert more["all"]["default"]["level"] == first["all"]["default"]["level"] and "mse" in more["all"]["default"]


def test_tables_have_paired_intervals(monkeypatch):
    monkeypatch.setattr(recall_claims, "DEFAULT", "level")
    results = measure_all(drawn(), [Level(), Released()])
    by_change = recall_claims.tables(results)[0]
    assert by_change.columns[-1] == "all, points to level (95 %)"
    rows = {row[:2]: row for row in by_change.rows}
    assert rows["10%", "level"][-1] == "–" and rows["10%", "patch_cosine"][-1] == "+0 to +0"
    assert all(len(row) == len(by_change.columns) for row in by_change.rows)


def test_pages_of_a_clip_differ_in_their_words_only():
    draw = PageDrawing("pages", 0)
    one, other = draw.page(), draw.page()
    assert one.shape == other.shape == (1080, 1920, 3) and (one != other).any()
    assert abs(one.mean() - other.mean()) < 2
    assert ((one != one[0, 0]).any(-1).any(1) == (other != other[0, 0]).any(-1).any(1)).mean() > 0.95  # the same lines
    assert len(draw.turns()) == 4 and all(event.kind == "page" for event in draw.events)
    assert PageDrawing("pages", 2).photographs != draw.photographs


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
