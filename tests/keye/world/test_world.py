"""Decoded files must show what the manifest says."""

import hashlib
import json
import tomllib
from collections import Counter, defaultdict
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

import stages
from keye import SlowFastEncoder
from keye.errors import ManifestError
from keye.evaluation.match import match
from keye.world import FAMILIES, Setting, generate, read_manifest, texts
from keye.world.__main__ import parse_counts
from keye.world.families import deal
from keye.world.render import write_mp4
from keye.world.scene import COLOURS, shape_mask
from keye.world.words import is_heldout, text_items

VIDEO = ("read", "count", "order", "when", "motion", "find")
EACH = 12


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("world")
    for split in ("train", "heldout"):
        generate(out, split, dict.fromkeys(FAMILIES, EACH), seed=3, workers=1, progress=False)
    return out


def media(sample: dict) -> dict | None:
    part = sample["messages"][0]["content"][0]
    return part if part["type"] != "text" else None


def frames(root: Path, sample: dict) -> tuple[np.ndarray, np.ndarray]:
    """Decoded frames [T, H, W, 3] as float and their times in seconds [T]."""
    with av.open(str(root / media(sample)["video"])) as container:
        decoded = [(frame.to_ndarray(format="rgb24"), frame.time) for frame in container.decode(video=0)]
    return np.stack([pixels for pixels, _ in decoded]).astype(float), np.array([time for _, time in decoded])


def inside(times: np.ndarray, event: dict) -> np.ndarray:
    return (times >= event["start"] - 1e-6) & (times < event["end"] - 1e-6)


def of(root: Path, family: str, split: str = "train") -> list[dict]:
    return [sample for sample in read_manifest(root / f"{split}.jsonl") if sample["family"] == family]


def nearest_colour(pixels: np.ndarray) -> str:
    """The name of the colour nearest to the mean of pixels [n, 3]."""
    mean = pixels.mean(0)
    return min(COLOURS, key=lambda name: np.abs(mean - COLOURS[name]).sum())


def shape_pixels(pixels: np.ndarray, box: list[int], shape: str) -> np.ndarray:
    """Pixels [n, 3] of the interior of a shape; chroma subsampling blurs its edges."""
    left, top, right, bottom = box
    mask = shape_mask(shape, right - left).copy()
    ring = max(2, (right - left) // 6)
    mask[:ring] = mask[-ring:] = mask[:, :ring] = mask[:, -ring:] = False
    height, width = pixels.shape[:2]
    return pixels[top:bottom, left:right][mask[: height - top, : width - left]]


def test_clips_are_h264_with_the_timestamps_of_the_manifest(world):
    for family in VIDEO:
        sample = of(world, family)[0]
        with av.open(str(world / media(sample)["video"])) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
            assert (stream.height, stream.width) == tuple(sample["meta"]["size"])
        _, times = frames(world, sample)
        np.testing.assert_allclose(times, np.arange(len(times)) / sample["meta"]["fps"], atol=1e-3)
        assert len(times) == sample["meta"]["duration"] * sample["meta"]["fps"]


def test_count_flashes_as_often_as_the_answer_says(world):
    for sample in of(world, "count"):
        pixels, times = frames(world, sample)
        meta = sample["meta"]
        assert meta["colour"] in sample["messages"][0]["content"][1]["text"]
        for box, wanted in ((meta["box"], True), (meta["other_box"], False)):
            events = [event for event in meta["events"] if (event["colour"] == meta["colour"]) is wanted]
            lit = np.logical_or.reduce([inside(times, event) for event in events])
            glow = np.array([shape_pixels(f, box, meta["shape"]).max(-1).mean() for f in pixels])
            assert glow[lit].min() > glow[~lit].max() + 80
            assert np.sum(np.diff(lit.astype(int)) == 1) == len(events), "flashes must not run into one another"
            assert not wanted or len(events) == int(sample["answer"])


def test_when_is_white_only_in_its_half_second(world):
    for sample in of(world, "when"):
        pixels, times = frames(world, sample)
        [event] = sample["meta"]["events"]
        assert float(sample["answer"]) == event["start"] and event["end"] - event["start"] == 0.5
        lit, glow = inside(times, event), pixels.min(-1).mean((1, 2))
        assert lit.sum() == 2 and glow[lit].min() > glow[~lit].max() + 30
        change = np.abs(np.diff(pixels, axis=0)).mean((1, 2, 3))
        assert change[1::2].min() > 20 > change[0::2].max(), "every half second differs from the one before"


def drawn_plans(family, count, duration, seed):
    """(frame types with seconds, answer) of `count` drawn clips under the encoder settings of the tiny recipe."""
    recipe = tomllib.loads((Path(stages.__file__).parent / "recipes/tiny.toml").read_text())
    encoder = SlowFastEncoder(**recipe["processor"]["encoder"])
    setting = Setting(duration=duration, difficulty=recipe["data"]["world"]["settings"]["difficulty"][family])
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        draft = FAMILIES[family](rng, setting, deal(family, setting, seed, index), index)
        pictures = np.stack([draft.draw(frame) for frame in range(draft.frames)])
        plan = encoder.plan(torch.from_numpy(pictures[:: draft.fps // 2]).permute(0, 3, 1, 2), source_fps=2.0)
        yield (tuple(plan.frame_types.tolist()), tuple(plan.timestamps.tolist())), draft.answer


@pytest.mark.parametrize("duration", [4.0, 8.0])
@pytest.mark.parametrize("family", ["count", "when"])
def test_the_plan_does_not_reveal_the_answer(family, duration):
    """A look-up of the answer by frame types and seconds, learnt from other clips, is no better than a guess."""
    table = defaultdict(Counter)
    for plan, answer in drawn_plans(family, 300, duration, 1):
        table[plan][answer] += 1
    right, chances = [], []
    prior = sum(table.values(), Counter())
    tolerance = 0.5 if family == "when" else None
    for plan, answer in drawn_plans(family, 150, duration, 2):
        known = table.get(plan, prior)
        guess = max(prior, key=lambda a: sum(n for b, n in known.items() if match(a, b, tolerance)))
        right.append(match(guess, answer, tolerance))
        chances.append(max(sum(n for b, n in prior.items() if match(a, b, tolerance)) for a in prior) / prior.total())
    chance = np.mean(chances)
    assert np.mean(right) < chance + 3 * np.sqrt(chance * (1 - chance) / len(right))


def test_files_reveal_nothing_without_decoding(world):
    """Packets of one size in display order with one key frame, and stills of one size, in every family."""
    for family in VIDEO:
        for sample in of(world, family):
            with av.open(str(world / media(sample)["video"])) as container:
                packets = [packet for packet in container.demux(video=0) if packet.size]
            assert len({packet.size for packet in packets}) == 1 and packets[0].size % 1024 == 0
            assert [packet.is_keyframe for packet in packets] == [True] + [False] * (len(packets) - 1)
            times = [packet.pts for packet in packets]
            assert times == sorted(times) == [packet.dts for packet in packets]
    for family in ("image_read", "image_ground", "image_place"):
        sizes = {(world / media(sample)["image"]).stat().st_size for sample in of(world, family)}
        assert len(sizes) == 1 and sizes.pop() > 3 * 112 * 112


def test_packets_are_padded_only_on_request(tmp_path):
    """Padding multiplies the size of long films and keeps all packets in memory."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    pictures = [noise, *[np.zeros_like(noise)] * 5]
    sizes = {}
    for uniform in (False, True):
        write_mp4(tmp_path / "clip.mp4", iter(pictures), 4, uniform=uniform)
        with av.open(str(tmp_path / "clip.mp4")) as container:
            sizes[uniform] = [packet.size for packet in container.demux(video=0) if packet.size]
            assert len(sizes[uniform]) == len(pictures)
    assert len(set(sizes[True])) == 1 and max(sizes[False]) > 20 * min(sizes[False])


def test_flashes_of_all_colours_change_the_picture_equally():
    """The change of red + green + blue per drawn pixel of a flash has the same distribution for all colours."""
    changes, setting = defaultdict(list), Setting(duration=4.0, difficulty=0.1)
    for index in range(300):
        draft = FAMILIES["count"](np.random.default_rng([7, index]), setting, str(1 + index % 3), index)
        boxes = {True: draft.meta["box"], False: draft.meta["other_box"]}
        for item in draft.meta["events"]:
            box = boxes[item["colour"] == draft.meta["colour"]]
            frame = round(item["start"] * setting.fps)
            lit, dim = (shape_pixels(draft.draw(f).astype(int), box, draft.meta["shape"]) for f in (frame, frame - 1))
            changes[item["colour"]].append((lit - dim).sum(-1).mean())
    assert set(changes) == set(COLOURS) - {"white"} and min(map(len, changes.values())) > 100
    means = {name: np.mean(values) for name, values in changes.items()}
    # Uniform over a width of 65: the standard error is less than 2.
    assert max(means.values()) - min(means.values()) < 8
    assert all(190 <= value <= 264 for values in changes.values() for value in values)


def test_text_questions_with_the_same_content_are_in_one_split():
    split = {question: is_heldout(question) for question, _ in text_items()}
    for a in range(10):
        for b in range(10):
            assert split[f"{a} + {b} ="] == split[f"{b} + {a} ="]
            assert a == b or split[f"Which is larger, {a} or {b}?"] == split[f"Which is larger, {b} or {a}?"]
    for story in {q.split(". ")[0] for q in split if q.startswith("A ")}:
        assert len({split[q] for q in split if q.startswith(story + ".")}) == 1


def test_the_tokenizer_sees_no_heldout_text():
    held = {question for question, _ in text_items() if is_heldout(question)}
    assert len(held) > 50 and not held & set(texts(samples=200))


def test_find_shows_its_colour_only_during_the_event(world):
    for sample in of(world, "find"):
        pixels, times = frames(world, sample)
        [event] = sample["meta"]["events"]
        lit = inside(times, event)
        seen = [nearest_colour(shape_pixels(f, sample["meta"]["box"], sample["meta"]["shape"])) for f in pixels[lit]]
        assert set(seen) == {sample["answer"]} and len(seen) == 2
        change = np.abs(np.diff(pixels.mean((1, 2)), axis=0)).sum(1)
        assert change.argmax() + 1 in (lit.argmax(), lit.argmax() + lit.sum())


def test_order_answers_the_colour_that_appears_first(world):
    for sample in of(world, "order"):
        first, second = sample["meta"]["events"]
        assert first["end"] < second["start"]
        assert sample["answer"] == first["colour"]
        assert sorted(sample["options"]) == sorted([first["colour"], second["colour"]])
        pixels, times = frames(world, sample)
        for event in (first, second):
            target = np.array(COLOURS[event["colour"]])
            near = (np.abs(pixels - target).sum(-1) < 90).sum((1, 2))
            assert near[inside(times, event)].min() > 300


def test_motion_goes_in_the_direction_of_the_answer(world):
    for sample in of(world, "motion"):
        pixels, _ = frames(world, sample)
        near = np.abs(pixels - np.array(COLOURS[sample["meta"]["colour"]])).sum(-1) < 120
        (y0, x0), (y1, x1) = (np.argwhere(near[index]).mean(0) for index in (0, -1))
        ways = {"left": x0 - x1, "right": x1 - x0, "up": y0 - y1, "down": y1 - y0}
        assert max(ways, key=ways.get) == sample["answer"] and ways[sample["answer"]] > 20


def test_card_is_visible_only_during_its_event(world):
    for sample in of(world, "read"):
        pixels, times = frames(world, sample)
        [event] = sample["meta"]["events"]
        left, top, right, bottom = sample["meta"]["box"]
        border = pixels[:, top + 3 : top + 6, left + 8 : right - 8].mean((1, 2, 3))
        shown = inside(times, event)
        assert border[shown].min() > 225 and border[~shown].max() < 200
        assert 1 <= event["end"] - event["start"] <= 2


def test_boxes_and_corners_are_where_the_shape_is(world):
    for sample in of(world, "image_ground"):
        pixels = np.asarray(Image.open(world / media(sample)["image"]), float)
        near = np.argwhere(np.abs(pixels - np.array(COLOURS[sample["meta"]["colour"]])).sum(-1) == 0)
        (top, left), (bottom, right) = near.min(0), near.max(0) + 1
        box = np.array(json.loads(sample["answer"])) / 1000 * 112
        np.testing.assert_allclose(box, [left, top, right, bottom], atol=2)
        assert all(0 <= value < 1000 for value in json.loads(sample["answer"]))
    for sample in of(world, "image_place"):
        pixels = np.asarray(Image.open(world / media(sample)["image"]), float)
        colour = sample["meta"]["things"][0].split()[0]
        y, x = np.argwhere(np.abs(pixels - np.array(COLOURS[colour])).sum(-1) == 0).mean(0)
        assert sample["answer"] == f"{'top' if y < 56 else 'bottom'} {'left' if x < 56 else 'right'}"


def test_the_same_seed_gives_the_same_bytes_for_any_number_of_workers(tmp_path):
    counts = dict.fromkeys(FAMILIES, 10)
    digests = []
    for name, workers in (("one", 1), ("two", 2)):
        generate(tmp_path / name, counts=counts, seed=5, duration=4, workers=workers, progress=False)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        digests.append([(p.relative_to(tmp_path / name), hashlib.sha256(p.read_bytes()).hexdigest()) for p in files])
    assert digests[0] == digests[1] and len(digests[0]) > 90
    other = generate(tmp_path / "other", counts={"count": 1}, seed=6, duration=4, progress=False).parent
    name = "clips/train-count-00000.mp4"
    assert (other / name).read_bytes() != (tmp_path / "one" / name).read_bytes()


def test_splits_share_no_clip_and_no_text_question(world):
    seen = defaultdict(set)
    for split in ("train", "heldout"):
        for sample in read_manifest(world / f"{split}.jsonl"):
            part = media(sample)
            content = (world / part[part["type"]]).read_bytes() if part else None
            seen[split].add(content or sample["messages"][0]["content"][0]["text"])
    assert not seen["train"] & seen["heldout"]
    share = np.mean([is_heldout(question) for question, _ in text_items()])
    assert 0.15 < share < 0.25


@pytest.mark.parametrize("family", ["count", "order", "when", "motion", "find", "image_place"])
def test_answers_are_balanced_and_independent_of_the_phrasing(family):
    setting, number = Setting(), 900
    answers, by_phrase = Counter(), defaultdict(Counter)
    for index in range(number):
        draft = FAMILIES[family](np.random.default_rng([1, index]), setting, deal(family, setting, 1, index), index)
        answers[draft.answer] += 1
        # Without the names of the options, the phrasing remains.
        phrase = draft.question
        for word in COLOURS:
            phrase = phrase.replace(word, "*")
        by_phrase[phrase][draft.options.index(draft.answer) if family == "order" else draft.answer] += 1
    assert max(answers.values()) - min(answers.values()) <= 1
    classes = 2 if family == "order" else len(answers)
    for counted in (c for phrase, c in by_phrase.items() if sum(c.values()) > 200):
        total = sum(counted.values())
        spread = 4 * np.sqrt(total / classes)
        assert max(counted.values()) < total / classes + spread


@pytest.mark.parametrize("difficulty", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("duration", [3.0, 6.5])
def test_every_difficulty_and_duration_can_be_drawn(tmp_path, difficulty, duration):
    path = generate(
        tmp_path,
        counts=dict.fromkeys(FAMILIES, 3),
        size=(56, 84),
        duration=duration,
        difficulty=difficulty,
        progress=False,
    )
    for sample in read_manifest(path):
        for event in sample["meta"].get("events", []):
            assert 0 <= event["start"] < event["end"] <= sample["meta"]["duration"]
            assert event["start"] % 0.5 == 0 and event["end"] % 0.5 == 0


def test_two_frames_per_second_fall_into_every_half_second():
    for fps in (2, 4, 8, 24):
        for duration in (3.0, 4.5, 8.0):
            setting = Setting(fps=fps, duration=duration)
            first_to_last = np.linspace(0, setting.frames - 1, setting.cells).round().astype(int)
            assert [setting.cell(frame) for frame in first_to_last] == list(range(setting.cells))


def test_texts_cover_the_characters_of_manifests(world):
    known = set("".join(texts(samples=30)))
    for sample in read_manifest(world / "train.jsonl"):
        assert set(sample["messages"][0]["content"][-1]["text"] + sample["answer"]) <= known
    assert texts(1, samples=5) == texts(1, samples=5)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{'messages': []}", r"m\.jsonl:2 is not JSON"),
        ('{"id": 1}', r"m\.jsonl:2 has no messages"),
        ('{"messages": [{"role": "user"}]}', r'm\.jsonl:2 has a message without "role" or "content"'),
        ("[1]", r"m\.jsonl:2 has no messages"),
    ],
)
def test_a_malformed_line_is_reported(tmp_path, line, complaint):
    good = '{"messages": [{"role": "user", "content": "hi"}]}'
    (tmp_path / "m.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(ManifestError, match=complaint):
        read_manifest(tmp_path / "m.jsonl")


def test_invalid_arguments_are_reported(tmp_path):
    with pytest.raises(ManifestError, match="no family 'counting'"):
        generate(tmp_path, counts={"counting": 1})
    with pytest.raises(ManifestError, match="no split 'test'"):
        generate(tmp_path, "test")
    with pytest.raises(ManifestError, match="duration 1.3"):
        generate(tmp_path, counts={"count": 1}, duration=1.3)
    with pytest.raises(ManifestError, match="does not exist"):
        read_manifest(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"counts": {"text": 0}}, "no samples.*at least 1"),
        ({"counts": {}}, "no samples.*at least 1"),
        ({"counts": {"text": -3}}, "text=-3.*0 or more"),
        ({"counts": {"text": 1}, "seed": -1}, "seed -1.*0 or more"),
        ({"counts": {"text": 1}, "workers": -1}, "workers -1.*at least 1"),
    ],
)
def test_counts_seed_and_workers_are_checked_before_anything_is_written(tmp_path, arguments, complaint):
    with pytest.raises(ManifestError, match=complaint):
        generate(tmp_path / "out", progress=False, **arguments)
    assert not (tmp_path / "out").exists()


def test_an_unwritable_directory_is_reported(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ManifestError, match="file.*give a path that you may write to"):
        generate(tmp_path / "file", counts={"text": 1}, progress=False)


def test_a_family_given_twice_is_reported():
    with pytest.raises(ManifestError, match="'count=2,count=3'.*each family once"):
        parse_counts("count=2,count=3")
