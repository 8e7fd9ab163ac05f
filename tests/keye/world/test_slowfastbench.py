"""SlowFastBench: what the pixels show, what the answers of a group share, and that it is drawn as it was frozen."""

import argparse
import dataclasses
import itertools
import re
from collections import Counter

import av
import numpy as np
import pytest
import torch

import keye.cli
from keye import SlowFastEncoder
from keye.commands import bench
from keye.commands.bench import parse_slices
from keye.errors import ManifestError
from keye.evaluation import ManifestBenchmark, match
from keye.world.scene import COLOURS
from keye.world.slowfastbench import EACH, FAMILIES, Painter, check_frozen, checksum, draw, questions, write
from keye.world.slowfastbench.schedules import HOLDS, NTH, PERIODS, slots
from keye.world.slowfastbench.write import SLICES, render

DRAWN = [name for name, row in FAMILIES.items() if not row.real]
LAMPS = ("find", "order", "count", "when", "duration", "together", "flicker")


def members(family, group=0, split="dev", still=True, height=144):
    """The questions of the first group from `group` on whose background is still."""
    row = FAMILIES[family]
    length = max(8, row.shortest)
    while True:
        items = [draw(family, split, group * row.members + i, length, height) for i in range(row.members)]
        if not still or (items[0].film.motion == "still" and not items[0].film.cuts) or family == "compare":
            return items
        group += 1


def pictures(item):
    return np.stack(Painter(item.film).cell_frames())


def seen(item, frames=None):
    """What the pixels alone show: (colour of the tag above or below, half seconds in which it is lit) of each lamp."""
    frames = (pictures(item) if frames is None else frames).astype(int)
    height = item.film.size[0]
    spread = np.ptp(frames, axis=0).max(-1)
    columns = np.flatnonzero(spread.max(0) > 60)
    strip = next(row for row in (height // 10, height - height // 10) if np.abs(frames[0, row, 0] - 26).max() < 8)
    found = []
    for part in np.split(columns, np.flatnonzero(np.diff(columns) > 3) + 1):
        rows = np.flatnonzero(spread[:, part].max(1) > 60)
        spot = frames[:, (rows[0] + rows[-1]) // 2, (part[0] + part[-1]) // 2].mean(-1)
        lit = spot > (spot.min() + spot.max()) / 2
        pixel = frames[0, strip, (part[0] + part[-1]) // 2]
        name = min(COLOURS, key=lambda name: np.abs(pixel - COLOURS[name]).sum())
        found.append((name if np.abs(pixel - COLOURS[name]).sum() < 60 else None, lit))
    return found


def flashes(lit):
    """Starts and lengths of runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], lit.astype(int), [0]])))
    return edges[::2].tolist(), (edges[1::2] - edges[::2]).tolist()


def solve(item, frames=None):
    """The answer of a question about lamps, from pixels and words alone."""
    lamps = [(name, *flashes(lit)) for name, lit in seen(item, frames) if name]
    question = item.question.partition(" Options")[0].replace("?", "").replace(".", "").split()
    named = [lamp for lamp in lamps if lamp[0] in question]
    if item.family == "find":
        return lamps[0][0]
    if item.family == "order":
        return sorted(lamps, key=lambda lamp: lamp[1])[[nth in question for nth in NTH].index(True)][0]
    if item.family == "count":
        return str(len(named[0][1]))
    if item.family == "when":
        return f"{named[0][1][0] / 2:g}"
    if item.family == "together":
        return next(name for name, starts, _ in lamps if starts == named[0][1] and name != named[0][0])
    words = HOLDS if item.family == "duration" else PERIODS
    word = max((word for word in words if f" {word} " in f" {' '.join(question)} "), key=len)
    ranked = sorted(lamps, key=lambda lamp: lamp[2][0])
    return ranked[sorted(words.values()).index(words[word])][0]


@pytest.mark.parametrize("family", LAMPS)
def test_the_answer_is_what_the_pixels_show(family):
    for group in (0, 5):
        for item in members(family, group):
            assert solve(item) == item.answer, item.question


@pytest.mark.parametrize("family", LAMPS)
def test_the_encoded_clip_shows_the_answer(family, tmp_path):
    path = tmp_path / "clip.mp4"
    for item in members(family, 2)[:2]:
        render((path, item.film), None)
        with av.open(str(path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert len(frames) == item.film.frames
        assert solve(item, np.stack(frames[:: item.film.fps // 2])) == item.answer


def test_ground_gives_the_box_of_the_lamp_that_is_lit():
    for item in members("ground"):
        frames = pictures(item).astype(int)
        lit = [np.argwhere(np.abs(frame - frames[0]).max(-1) > 60) for frame in frames]
        spots = [spot for i, spot in enumerate(lit) if len(spot) and not len(lit[i - 1])]
        spot = spots[[nth in item.question for nth in NTH].index(True)]
        (top, left), (bottom, right) = spot.min(0), spot.max(0) + 1
        height, width = item.film.size
        box = [1000 * left / width, 1000 * top / height, 1000 * right / width, 1000 * bottom / height]
        assert match(str([round(value) for value in box]), item.answer)


def ways(item):
    """What the pixels show of `turn`: colour of each tag -> which way its disc goes round."""
    frames = pictures(item).astype(int)
    height, width = item.film.size
    strip = next(row for row in (height // 10, height - height // 10) if np.abs(frames[0, row, 0] - 26).max() < 8)
    rows = slice(height // 4, None) if strip < height // 2 else slice(0, 3 * height // 4)
    found = {}
    for columns in (slice(0, width // 2), slice(width // 2, None)):
        half = frames[:, :, columns]
        pixel = half[0, strip, half.shape[2] // 2]
        name = min(COLOURS, key=lambda name: np.abs(pixel - COLOURS[name]).sum())
        spots = [np.argwhere((frame[rows] > 180).all(-1)).mean(0) for frame in half]
        path = [spots[0], *(after for spot, after in itertools.pairwise(spots) if (spot != after).any())]
        centre = np.mean(path[:-1], axis=0)
        assert len(path) == 7 and np.allclose(path[0], path[-1])
        (down, right), (below, beside) = path[0] - centre, path[1] - centre
        found[name] = "clockwise" if right * below - down * beside > 0 else "counter-clockwise"
    return found


def test_one_disc_goes_round_each_way_and_the_answer_is_its_tag():
    asked, right = Counter(), Counter()
    for group in range(12):
        for item in members("turn", group):
            found = ways(item)
            [way] = {"clockwise", "counter-clockwise"} & {word.strip("?.") for word in item.question.split()}
            assert sorted(found.values()) == ["clockwise", "counter-clockwise"] and set(item.options) == set(found)
            assert found[item.answer] == way
            asked[way] += 1
            right[item.options.index(item.answer)] += 1
    assert len(asked) == 2 and right[0] == right[1]


def test_no_patch_shows_a_tag_and_a_disc():
    for item in (item for group in range(12) for item in members("turn", group, height=240)):
        frames = pictures(item).astype(int)
        moves = np.flatnonzero(np.ptp(frames, axis=0).max((1, 2)) > 40)
        tags = np.flatnonzero(np.ptp(frames[0], axis=1).max(1) > 100)
        tags = tags[(tags < 0.2 * 240) if moves.min() > 0.2 * 240 else (tags > 0.8 * 240)]
        assert len(tags) and min(abs(moves.min() - tags.max()), abs(tags.min() - moves.max())) > 0.2 * 240


@pytest.mark.parametrize("family", ["order", "turn"])
def test_minimal_pairs_have_one_first_frame_and_the_same_frames_in_another_order(family):
    items = members(family, 3)
    films = [pictures(item) for item in items]
    assert len({item.question for item in items}) == 1 and len({item.answer for item in items}) == len(items)
    counts = [Counter(frame.tobytes() for frame in frames) for frames in films]
    assert all(count == counts[0] for count in counts)
    assert all((frames[0] == films[0][0]).all() for frames in films)
    assert len({frames.tobytes() for frames in films}) == len(items)


@pytest.mark.parametrize("family", ["find", "coverage"])
def test_clips_of_a_tags_group_differ_in_their_tags_alone_and_have_equal_plans(family):
    items = members(family, height=240)
    films = [pictures(item) for item in items]
    height = items[0].film.size[0]
    varies = np.flatnonzero(np.ptp(np.stack([frames[0] for frames in films]).astype(int), axis=0).max((1, 2)))
    assert len(varies) and np.ptp(varies) < 0.17 * height
    for measure in ("mse", "patch_l1", "patch_cosine", "lab"):
        encoder = SlowFastEncoder(measure=measure)
        plans = [encoder.plan(torch.from_numpy(f).permute(0, 3, 1, 2), source_fps=2.0).to_dict() for f in films]
        assert all(plan["frame_types"] == plans[0]["frame_types"] for plan in plans)
        scores = np.array([plan["similarity"][1:] for plan in plans], float)
        assert np.ptp(scores, axis=0).max() < 1e-6


@pytest.mark.parametrize("family", [name for name in DRAWN if FAMILIES[name].tags])
def test_a_plan_does_not_depend_on_which_tag_is_where(family):
    film = members(family, height=240)[0].film
    tagged = FAMILIES[family].places
    other = dataclasses.replace(film, tags=(*film.tags[1:tagged], film.tags[0], *film.tags[tagged:]))
    films = [np.stack(Painter(one).cell_frames()) for one in (film, other)]
    assert (films[0] != films[1]).any()
    for measure in ("mse", "patch_l1", "patch_cosine", "lab"):
        encoder = SlowFastEncoder(measure=measure)
        plans = [encoder.plan(torch.from_numpy(f).permute(0, 3, 1, 2), source_fps=2.0).to_dict() for f in films]
        assert plans[0]["frame_types"] == plans[1]["frame_types"]
        assert np.ptp(np.array([plan["similarity"][1:] for plan in plans], float), axis=0).max() < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_the_answers_of_a_group_are_all_different_and_options_have_no_preferred_place(family):
    row, items = FAMILIES[family], list(questions.questions(family, "heldout"))
    assert len(items) == EACH >= 200
    for start in range(0, EACH, row.members):
        group = items[start : start + row.members]
        assert len({item.answer for item in group}) == row.members and len({item.group for item in group}) == 1
        assert len({item.clip for item in group}) == (1 if row.group == "asks" else row.members)
    if items[0].options:
        places = Counter(item.options.index(item.answer) for item in items)
        expected = EACH / len(items[0].options)
        assert all(abs(count - expected) < 4 * expected**0.5 for count in places.values())
        assert all(match(item.answer, item.answer, item.tolerance, list(item.options)) for item in items)
        wrong = ((item, option) for item in items for option in item.options if option != item.answer)
        assert not any(match(option, item.answer, item.tolerance, list(item.options)) for item, option in wrong)


def test_splits_have_different_questions_and_lengths_reach_from_4_seconds_to_an_hour():
    films = [draw(family, "heldout", i).film for family in DRAWN for i in range(0, EACH, FAMILIES[family].members)]
    assert {film.cells / 2 for film in films} >= {4, 8, 16, 60, 600, 3600}
    assert {film.size[0] for film in films} >= {144, 240, 480, 720, 1080}
    assert len(DRAWN) >= 10
    assert draw("find", "dev", 0).film.seed != draw("find", "heldout", 0).film.seed


@pytest.mark.parametrize("family", FAMILIES)
def test_questions_are_drawn_as_they_were_frozen(family):
    for split in ("dev", "heldout"):
        check_frozen(family, split)


def test_a_changed_drawing_is_noticed(monkeypatch):
    assert checksum("find", "dev", 8) == checksum("find", "dev", 8) != checksum("find", "heldout", 8)
    monkeypatch.setitem(FAMILIES, "find", dataclasses.replace(FAMILIES["find"], hold=(1, 2)))
    with pytest.raises(ManifestError, match="find differ"):
        check_frozen("find", "dev")


def test_slots_do_not_overlap_and_a_clip_that_is_too_short_is_refused():
    rng = np.random.default_rng(0)
    for _ in range(200):
        starts = slots(rng, 16, [3, 1, 2])
        assert starts[0] >= 1 and starts[2] + 2 <= 16
        assert starts[1] > starts[0] + 3 and starts[2] > starts[1] + 1
    with pytest.raises(ValueError, match="too few"):
        slots(rng, 8, [3, 4])


def test_a_slice_is_written_continued_and_read(tmp_path):
    where = {"length": ["16s"], "height": ["144p", "240p"]}
    path = write(tmp_path, "dev", ["order", "read"], 40, where, workers=1, progress=False)
    benchmark = ManifestBenchmark(path)
    assert len(benchmark) and {q.slices["length"] for q in benchmark} == {"16s"}
    assert {q.family for q in benchmark} == {"order", "read"} and all(q.group for q in benchmark)
    clips = sorted((tmp_path / "clips").iterdir())
    plan = SlowFastEncoder().plan(clips[0])
    assert len(plan) in (16, 32) and plan.source_size[0] in (144, 240)
    before = {clip: clip.stat().st_mtime_ns for clip in clips}
    clips[0].unlink()
    write(tmp_path, "dev", ["order", "read"], 40, where, workers=1, progress=False)
    assert [clip for clip in clips if clip.stat().st_mtime_ns != before[clip]] == [clips[0]]


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"families": ["fund"]}, "no family 'fund'"),
        ({"split": "test"}, "no split 'test'"),
        ({"where": {"size": ["144p"]}}, "no slice 'size'"),
        ({"where": {"length": ["2h"]}}, "length has no '2h'; choose among 16s, 1min, 10min, 1h"),
        ({"where": {"length": ["16s"], "load": ["heavy"]}}, "slices length=16s load=heavy; widen them"),
        ({"each": 0}, "at least 1"),
        ({"families": ["real_find"]}, "scripts/clips.py"),
    ],
)
def test_what_cannot_be_written_is_one_clear_error(tmp_path, asked, complaint):
    with pytest.raises(ManifestError, match=complaint):
        write(tmp_path, **{"families": ["find"], "each": 1, "progress": False, **asked})


def test_a_folder_with_another_version_is_refused(tmp_path):
    (tmp_path / "slowfastbench.json").write_text('{"benchmark": "SlowFastBench", "version": 0}')
    with pytest.raises(ManifestError, match="another version"):
        write(tmp_path, families=["find"], each=1, progress=False)


def test_a_damaged_folder_and_an_unknown_family_are_one_sentence(tmp_path):
    (tmp_path / "slowfastbench.json").write_text("{")
    with pytest.raises(ManifestError, match="slowfastbench.json is damaged; delete it, or give an empty folder"):
        write(tmp_path, "dev", ["find"], 1, workers=1, progress=False)
    parser = argparse.ArgumentParser()
    bench.add_parser(parser.add_subparsers())
    with pytest.raises(ManifestError, match="has no family 'finds'"):
        bench.call(parser.parse_args(["bench", "--list", "--families", "finds"]))


def test_the_command_lists_families_and_reads_slices(capsys):
    assert keye.cli.main(["bench", "--list"]) == 0
    assert capsys.readouterr().out.split("\n")[0].startswith("find ")
    assert parse_slices(["length=16s,1min", "length=1h"]) == {"length": ["16s", "1min", "1h"]}
    with pytest.raises(ManifestError, match="--slice 'short'"):
        parse_slices(["short"])


def test_slices_name_every_value_that_is_drawn():
    for family in FAMILIES:
        for item in questions.questions(family, "dev"):
            assert all(value in SLICES[name] for name, value in item.slices.items()) and set(item.slices) == set(SLICES)


def test_an_unknown_family_is_one_sentence_and_commas_separate_families(tmp_path, capsys):
    assert keye.cli.main(["bench", "--list", "--families", "find,order"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert keye.cli.main(["bench", "--list", "--families", "fnd"]) == 2
    assert "no family 'fnd'; choose among find" in capsys.readouterr().err


def test_the_page_has_questions_answers_and_whether_the_plan_shows_the_events(tmp_path, capsys):
    page = tmp_path / "page.html"
    assert keye.cli.main(["bench", str(tmp_path), "--show", str(page)]) == 2
    assert "draw it first: keye bench" in capsys.readouterr().err
    where = {"length": ["16s"], "height": ["144p", "240p"]}
    path = write(tmp_path, "heldout", ["when"], 40, where, workers=1, progress=False)
    shortest = min(
        ManifestBenchmark(path), key=lambda question: draw("when", "heldout", int(question.id[-5:])).film.cells
    )
    for options, kind in (
        ([], " s: (slow|fast)<"),
        (["--policy", "uniform:100", "--max-tokens", "48"], " s: not shown<"),
    ):
        assert keye.cli.main(["bench", str(tmp_path), "--show", str(page), *options]) == 0
        text = page.read_text()
        assert shortest.messages[0]["content"][1]["text"] in text and f"answer: {shortest.answer}" in text
        assert re.search(kind, text) and "data:image/jpeg" in text
