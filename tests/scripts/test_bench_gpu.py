"""The parts of scripts/bench/gpu run small on a CPU, keep their rows when they are killed, and count what fails."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
import torch

from keye.errors import KeyeError
from keye.model import flops
from keye.processor.processor import Sample
from scripts.bench.common import record
from scripts.bench.common.process import reason_of
from scripts.bench.gpu import __main__ as gpu_main
from scripts.bench.gpu import journal as gpu_journal
from scripts.bench.gpu import pack as gpu_pack
from scripts.bench.gpu import plans as gpu_plans
from scripts.bench.gpu import runner as gpu_runner
from scripts.bench.gpu import settings as gpu_settings
from scripts.bench.gpu import steps as gpu_steps
from scripts.bench.gpu import waterfall
from scripts.bench.gpu.journal import TIMES_UP, Journal
from scripts.bench.gpu.parts import attention, cuda_tests, estimates, layers
from scripts.bench.gpu.plans import DecodedPlan
from scripts.bench.model import layers as model_layers
from stages.data import collate

CPU = torch.device("cpu")


def drawn_plan(name: str = "drawn", seed: int = 0) -> DecodedPlan:
    """A plan with slow frames of 6 × 8 patches and fast ones of 4 × 6."""
    types = [0, 1, 1, 0, 1]
    grid = torch.tensor([(1, 6, 8) if kind == 0 else (1, 4, 6) for kind in types])
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (int(grid.prod(1).sum()), 3, 14, 14), dtype=torch.uint8, generator=draw)
    return DecodedPlan(name, pixels, grid, torch.arange(5) / 2, torch.tensor(types))


@pytest.fixture
def plans(tmp_path: Path) -> Path:
    """A folder with two drawn plans."""
    folder = tmp_path / "plans"
    for number in range(2):
        drawn_plan(seed=number).save(folder / f"drawn{number}{gpu_plans.SUFFIX}")
    return folder


def journal(out: Path, part: str = "made", limit: float = 1e9) -> Journal:
    found = Journal(part, out, CPU, True, limit, out)
    found._read(again=False)
    return found


def run_part(module: object, out: Path, plans: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> dict:
    """The record of a part that runs small in this process."""
    words = ["--small", "--device", "cpu", "--out", str(out), "--plans", str(plans), *options]
    monkeypatch.setattr(sys, "argv", ["part", *words])
    assert module.main() == 0
    return json.loads((out / f"{module.PART}.json").read_text())


# --- the journal


def test_a_rerun_takes_finished_rows_and_measures_failed_ones_again(tmp_path) -> None:
    first = journal(tmp_path)
    assert first.row("a", lambda: {"value": 1}) == {"value": 1}
    assert first.row("b", lambda: 1 / 0) is None
    assert first.failed == {"b": "failed: ZeroDivisionError: division by zero"}
    second = journal(tmp_path)
    assert second.row("a", lambda: pytest.fail("measured again")) == {"value": 1}
    assert second.row("b", lambda: {"value": 2}) == {"value": 2} and not second.failed


def test_rows_after_the_time_is_up_are_named(tmp_path) -> None:
    late = journal(tmp_path, limit=-1)
    assert late.row("a", lambda: pytest.fail("began")) is None
    late.save()
    saved = json.loads((tmp_path / "made.json").read_text())
    assert saved["tables"][-1]["rows"] == [["a", TIMES_UP]]


def test_a_part_that_is_killed_goes_on_at_the_row_it_was_in(tmp_path) -> None:
    code = (
        "import os, pathlib, signal, sys, torch\n"
        "from scripts.bench.gpu.journal import Journal\n"
        f"j = Journal('made', pathlib.Path({str(tmp_path)!r}), torch.device('cpu'), True, 1e9, pathlib.Path('.'))\n"
        "j._read(False)\n"
        "j.row('a', lambda: {'process': os.getpid()})\n"
        "if sys.argv[1] == 'die': j.row('b', lambda: os.kill(os.getpid(), signal.SIGKILL))\n"
        "j.row('b', lambda: {'process': os.getpid()})\n"
    )
    command = [sys.executable, "-c", code]
    assert subprocess.run([*command, "die"], cwd=record.ROOT, check=False, timeout=120).returncode == -9
    first = json.loads((tmp_path / "rows" / "made.jsonl").read_text().splitlines()[2])["values"]
    with (tmp_path / "rows" / "made.jsonl").open("a") as file:
        file.write('{"key": "c", "sta')  # a line that the kill cut off
    again = journal(tmp_path)
    assert again.found == {"a": first}
    assert again.row("b", lambda: {"value": 1}) == {"value": 1}
    assert journal(tmp_path).found == {"a": first, "b": {"value": 1}}


def test_a_row_that_has_twice_ended_its_process_is_left_out(tmp_path) -> None:
    first = journal(tmp_path)
    for _ in range(2):
        first._write({"key": "a", "state": "begun"})
    second = journal(tmp_path)
    assert second.row("a", lambda: pytest.fail("began")) is None
    assert "ended its process twice" in second.failed["a"]


def test_rows_of_another_device_are_kept_aside(tmp_path) -> None:
    journal(tmp_path).row("a", lambda: {"value": 1})
    path = tmp_path / "rows" / "made.jsonl"
    path.write_text(path.read_text().replace("the CPU", "a GPU"))
    assert journal(tmp_path).found == {} and "a GPU" in path.with_suffix(".jsonl.old").read_text()


def test_a_cpu_measures_no_shapes_of_a_gpu_and_a_missing_gpu_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for options, sentence in ((["--device", "cpu"], "takes --small"), ([], "torch finds none here")):
        monkeypatch.setattr(sys, "argv", ["part", *options, "--out", str(tmp_path)])
        with pytest.raises(KeyeError, match=sentence):
            attention.main()
    assert not list(tmp_path.iterdir())


# --- plans and documents


def test_a_plan_is_read_as_it_was_saved_and_a_damaged_one_is_named(tmp_path) -> None:
    made, path = drawn_plan(), tmp_path / f"drawn{gpu_plans.SUFFIX}"
    made.save(path)
    found = DecodedPlan.open(path)
    assert found.name == "drawn" and found.tokens == (2 * 48 + 3 * 24) // 4
    for name in ("pixels", "grid", "seconds", "types"):
        assert torch.equal(getattr(found, name), getattr(made, name))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(KeyeError, match="holds no decoded plan"):
        DecodedPlan.open(path)


def test_a_document_has_its_tokens_pixels_and_labels() -> None:
    sizes, plans = gpu_steps.sizes_of(small=True), [drawn_plan(seed=0), drawn_plan(seed=1)]
    made = gpu_plans.document(plans, sizes.config, 100, 0.6, 1)
    ids, labels = made["input_ids"], made["labels"]
    visual = ids == sizes.config.video_token_id
    patches = int(made["video_grid_thw"].prod(1).sum())
    assert len(ids) == 100 and len(made["pixel_values_videos"]) == patches == 4 * int(visual.sum()) > 0
    assert (labels[visual] == -100).all() and torch.equal(labels[~visual], ids[~visual])
    assert torch.equal(made["pixel_values_videos"][:48], plans[1].pixels[:48])  # the seed chooses the plan
    text = gpu_plans.document(plans, sizes.config, 10, 0.0, 0)
    assert "pixel_values_videos" not in text and len(text["input_ids"]) == 10
    documents = [made, text, gpu_plans.document(plans, sizes.config, 60, 0.8, 0)]
    expected = collate.pack([Sample(**fields) for fields in documents])
    found = gpu_plans.pack(documents)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_the_middle_of_a_frame_is_a_part_of_it() -> None:
    plan = drawn_plan()
    small = gpu_plans.middle(plan, most=4)
    assert small.grid[:, 1:].amax() == 4
    frame = plan.pixels[:48].view(6, 8, 3, 14, 14)
    assert torch.equal(small.pixels[:16], frame[0:4, 2:6].reshape(16, 3, 14, 14))


def test_the_model_for_the_gpu_has_the_layers_that_fit() -> None:
    few, many = (gpu_steps.sizes_of(False, memory).config.text_config.num_hidden_layers for memory in (80e9, 1e12))
    assert 0 < few < many == 36


def test_packs_of_the_released_shapes_hold_8192_tokens() -> None:
    large = gpu_settings.sizes_of(False, [drawn_plan()])
    held = [sum(height * width for height, width in frames) for frames in large.frames.values()]
    assert all(limit - 48 < patches <= limit for patches, limit in zip(held, (8192, 32_768), strict=True))
    assert all(sum(lengths) == 8192 for lengths in large.documents.values())
    text, vision = large.config.text_config, large.config.vision_config
    assert (text.hidden_size, text.num_attention_heads, text.num_key_value_heads, text.head_dim) == (4096, 32, 8, 128)
    assert (vision.hidden_size, vision.intermediate_size, vision.num_attention_heads) == (1152, 4304, 16)


# --- the parts


def test_attention_runs_small_and_compares_each_backend_with_float32(tmp_path, plans, monkeypatch) -> None:
    found = run_part(attention, tmp_path, plans, monkeypatch)
    assert found["quick"] and found["claims"] == []  # small shapes claim nothing
    rows = next(table for table in found["tables"] if table["title"] == "Packed attention alone")["rows"]
    assert [row[1] for row in rows] == ["sdpa", "plain"] * 2
    assert all(float(row[5]) < 1e-5 and float(row[6]) < 1e-5 for row in rows)


def test_a_wrong_backend_does_not_meet_the_bound(tmp_path, plans, monkeypatch) -> None:
    real = attention.varlen

    def without_boundaries(q, k, v, cu_seqlens, causal, *, backend):
        return real(q, k, v, cu_seqlens[[0, -1]] if backend == "sdpa" else cu_seqlens, causal, backend=backend)

    monkeypatch.setattr(attention, "varlen", without_boundaries)
    run_part(attention, tmp_path, plans, monkeypatch)
    kept = journal(tmp_path, "attention")
    sizes = gpu_settings.sizes_of(True, gpu_plans.plans_in(plans, small=True))
    claims = attention.claims_of(kept, attention.cases_of(sizes), sizes)
    assert len(claims) == 2 and all(claim.met is False for claim in claims)


def test_layers_run_small_and_a_setting_that_fails_is_a_row(tmp_path, plans, monkeypatch) -> None:
    broken = model_layers.their_vision
    calls = []

    def theirs(*args: object) -> model_layers.Stack:
        calls.append(1)
        if len(calls) > 1:
            raise torch.OutOfMemoryError("no room\nfor more")
        return broken(*args)

    monkeypatch.setattr(model_layers, "their_vision", theirs)
    monkeypatch.setattr(gpu_settings, "COMPILER", "eager")
    found = run_part(layers, tmp_path, plans, monkeypatch)
    tables = {table["title"]: table["rows"] for table in found["tables"]}
    settings = [row[1] for row in tables["One layer: decoder, 3 documents"]]
    assert {"ours, sdpa", "ours, sdpa, compiled, checkpointing", "Qwen2.5-VL"} <= set(settings)
    failed = [row for row in tables["One layer: vision, up to 96 patches"] if row[2].startswith("failed")]
    assert len(failed) == 2 and failed[0][2] == "failed: OutOfMemoryError: no room"
    assert len(tables["Passes of the model over one pack, forward + backward"]) == 10


def test_passes_of_the_waterfall_count_and_compute_what_they_say() -> None:
    model = waterfall.model_of(True, CPU, torch.float32)
    batch = waterfall.to_device(waterfall.packs_of([drawn_plan()], model.config, True, 1)[0], CPU)
    passes = waterfall.passes_of(model, batch)
    visual = int((batch["input_ids"] == model.config.video_token_id).sum())
    labels = int((batch["shift_labels"] != -100).sum())
    frames = batch["video_grid_thw"][:, 1:].tolist()
    lengths = batch["cu_seqlens"].diff().tolist()
    assert sum(lengths) == 96 and 4 * visual == sum(height * width for height, width in frames) > 0
    widths = model.config.vision_config.hidden_size, model.config.text_config.hidden_size
    vision = (flops.tower(model.config.vision_config, frames) + flops.projector(*widths, 4 * visual)).total
    head = flops.head(model.config.text_config, labels).total
    work = {name: count for name, (_, count) in passes.items()}
    assert work[waterfall.WHOLE] - work[waterfall.FEATURES] == 3 * vision
    assert work[waterfall.FEATURES] == work[waterfall.TEXT] == work[waterfall.LAYERS] + 3 * head
    tower = model.visual.encoder.layers[0].mlp.fc1.weight
    for name, (call, _) in passes.items():
        call()
        # Text without given features runs the tower over an empty frame: its gradient is there, and zero.
        reached = tower.grad is not None and bool(tower.grad.any())
        assert reached == (name == waterfall.WHOLE)


def test_parts_on_kernels_need_neither_deepspeed_nor_a_video_library() -> None:
    modules = ("av", "datasets", "deepspeed", "peft", "skimage")
    names = ("__main__", "parts.cuda_tests", "parts.attention", "parts.layers", "pack")
    code = f"import sys\nfor name in {modules}: sys.modules[name] = None\n"
    code += "".join(f"import scripts.bench.gpu.{name}\n" for name in names)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=record.ROOT, timeout=120)


def test_reports_of_tests_are_counted(tmp_path) -> None:
    case = (
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 1 == 2\n@pytest.mark.skip(reason='no GPU')\n"
        "def test_c(): pass\n"
    )
    (tmp_path / "test_made.py").write_text(case)
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", "-p", "no:cacheprovider", "test_made.py"]
    subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, timeout=120)
    found = cuda_tests.counts(report)
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 1, 1)
    assert found["reason"].startswith("test_b: ") and "assert 1 == 2" in found["reason"]
    assert "tests/keye/model/test_backends.py" in cuda_tests.files()


# --- the runner


CODES = {
    "attention": "import time; time.sleep(60)",
    "layers": "import sys; print('no layers'); sys.exit(3)",
    "context": "print('all found')",
}


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Short programs in the place of parts; the options that each of them got."""
    real, options = subprocess.Popen, []

    def start(command: list[str], **settings: object) -> subprocess.Popen:
        options.append(command[3:])
        return real([sys.executable, "-c", CODES[command[2].rpartition(".")[2]]], **settings)

    monkeypatch.setattr(gpu_runner.subprocess, "Popen", start)
    return options


def run_gpu(monkeypatch: pytest.MonkeyPatch, out: Path, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu", "--small", "--device", "cpu", "--out", str(out), *options])
    return gpu_main.main()


def test_a_part_that_hangs_or_fails_is_recorded_and_the_next_one_runs(tmp_path, monkeypatch, parts) -> None:
    monkeypatch.setattr(gpu_runner, "GRACE", 1.0)
    journal(tmp_path, "attention")._write({"key": "a", "state": "begun"})
    assert run_gpu(monkeypatch, tmp_path, "--limit", "0", "--part", "b", "layers", "e") == 1
    notes = [json.loads((tmp_path / f"{name}.json").read_text())["notes"][0] for name in ("attention", "layers")]
    assert "was stopped after 1 s" in notes[0] and "ended with code 3" in notes[1]
    text = (tmp_path / "gpu.md").read_text()
    assert "Incomplete: it was stopped" in text and "Not measured yet: cuda_tests, training" in text
    assert (tmp_path / "rows" / "layers.log").read_text().splitlines()[-1] == "no layers"
    assert "stopped" in (tmp_path / "rows" / "attention.jsonl").read_text().splitlines()[-1]


def test_a_row_that_was_stopped_for_its_time_is_measured_again_however_often(tmp_path) -> None:
    for _ in range(3):
        journal(tmp_path)._write({"key": "a", "state": "begun"})
        gpu_journal.mark_stopped(tmp_path, "made")
        gpu_journal.mark_stopped(tmp_path, "made")  # a second mark does not count for another row
    assert journal(tmp_path).failed == {"a": gpu_journal.STOPPED}
    assert journal(tmp_path).row("a", lambda: {"value": 1}) == {"value": 1}


def test_a_call_leaves_what_it_has_no_time_for(tmp_path, monkeypatch, parts, capsys) -> None:
    bundle = tmp_path / "results.tar"
    options = ["--within", "100", "--since", str(time.time() - 20), "--bundle", str(bundle), "--part", "e", "b"]
    monkeypatch.setattr(gpu_runner.Call, "has_time", lambda call: len(parts) < 1)
    assert run_gpu(monkeypatch, tmp_path / "gpu", *options) == 1
    assert "no time was left for attention: the same command continues" in capsys.readouterr().out
    given = {name: parts[0][parts[0].index(name) + 1] for name in ("--limit", "--parent")}
    limit = 100 - 20 - gpu_runner.MARGIN - gpu_runner.GRACE
    assert limit - 5 < float(given["--limit"]) <= limit and given["--parent"] == str(os.getpid())
    with tarfile.open(bundle) as archive:
        names = archive.getnames()
        assert archive.extractfile("gpu/rows/context.log").read().endswith(b"all found\n")
    assert {"gpu/gpu.md", "gpu/rows/context.log"} == set(names)


def test_a_log_keeps_the_end_of_earlier_calls_and_the_beginning_of_this_one(tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.setattr(gpu_runner, "LOG", 50)
    path = tmp_path / "rows" / "made.log"
    for call in ("first", "second", "third"):
        reader, writer = os.pipe()
        os.write(writer, f"{call} begins\n{'x' * 100}\n{call} ends\n".encode())
        os.close(writer)
        with os.fdopen(reader, "rb") as stream:
            gpu_runner.copy_output(stream, path)
    kept = path.read_text()
    assert "third begins" in kept and "first" not in kept and len(kept) < 50 + 50 + 30
    assert capfd.readouterr().out.count(" ends\n") == 3


def test_the_time_of_a_part_is_its_own_or_what_is_left_of_the_call(tmp_path) -> None:
    own = gpu_runner.Call(tmp_path, 420.0)
    assert own.times() == (420.0, 480.0) and own.has_time()
    late = gpu_runner.Call(tmp_path, 420.0, within=570.0, since=time.time() - 500)
    assert not late.has_time()
    early = gpu_runner.Call(tmp_path, 420.0, within=1200.0)
    assert early.times() == (420.0, 420.0 + gpu_runner.LONGEST) and early.has_time()
    begun, stopped = gpu_runner.Call(tmp_path, 420.0, within=570.0, since=time.time() - 100).times()
    assert 399 < begun <= 400 and 459 < stopped <= 460


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_parts_end_with_a_runner_that_is_ended_and_the_next_call_continues(tmp_path, number) -> None:
    code = (
        "import sys, time, subprocess\nfrom scripts.bench.gpu.journal import end_with\n"
        "end_with(int(sys.argv[sys.argv.index('--parent') + 1]), 0.05)\n"
        "print(subprocess.Popen(['sleep', '60']).pid, flush=True)\ntime.sleep(60)\n"
    )
    runner = (
        "import subprocess, sys\nfrom scripts.bench.gpu import __main__ as main, runner\nreal = subprocess.Popen\n"
        f"runner.subprocess.Popen = lambda c, **o: real([sys.executable, '-c', {code!r}, *c[3:]], **o)\n"
        f"sys.argv = ['gpu', '--small', '--device', 'cpu', '--out', {str(tmp_path)!r}, '--part', 'b']\nmain.main()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", runner], cwd=record.ROOT, stdout=subprocess.PIPE, text=True)
    child = next(int(line) for line in process.stdout if line.strip().isdigit())
    assert Path(f"/proc/{child}").exists()
    with pytest.raises(KeyeError, match="another call writes to"), gpu_runner.alone(tmp_path, patience=0):
        pass
    process.send_signal(number)
    assert process.wait(timeout=60) == (-9 if number == signal.SIGKILL else 143)
    with gpu_runner.alone(tmp_path, patience=30):  # as soon as its part has ended
        state = Path(f"/proc/{child}/stat")
        assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_the_reason_of_a_failed_process_is_its_exception() -> None:
    errors = "\n".join([
        "[rank0]: Traceback (most recent call last):", '[rank0]:   File "steps.py", line 3, in step',
        "[rank0]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB",
        "[rank0]:[W1129 11:00:00 ProcessGroupNCCL.cpp:1553] Warning: destroy_process_group() was not called",
    ])  # fmt: skip
    assert reason_of(errors, 1) == "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    assert reason_of("warning\nerror: no plans here\n", 2) == "error: no plans here"
    assert reason_of("Killed\n", -9) == "its process ended with code -9: Killed"
    assert reason_of("", -9) == "its process ended with code -9"


# --- the archive and the estimates


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An archive with a made wheel, clip and plan, and the code of this checkout."""
    clip, plan = tmp_path / "made.mp4", tmp_path / f"made{gpu_plans.SUFFIX}"
    clip.write_bytes(b"clip")
    drawn_plan().save(plan)

    def wheels(folder: Path, python: str) -> list[str]:
        (folder / f"av-1-{python}.whl").write_bytes(b"wheel")
        return ["without deepspeed (no network)"]

    monkeypatch.setattr(gpu_pack, "wheels", wheels)
    monkeypatch.setattr(gpu_pack, "make", lambda folder, clips: [plan])
    scratch, out = tmp_path / "scratch", tmp_path / "gpu.tar"
    scratch.mkdir()
    gpu_pack.write(out, *gpu_pack.sections(scratch, "3.12", [clip]))
    return out


def test_an_archive_holds_what_it_lists(packed, tmp_path) -> None:
    with tarfile.open(packed) as archive:
        names = {entry.name: entry for entry in archive.getmembers()}
        listing = archive.extractfile("gpu/CONTENTS.txt").read().decode().splitlines()
    assert listing[0] == "without deepspeed (no network)"
    assert {f"gpu/{line.split(maxsplit=1)[1]}" for line in listing[1:]} == names.keys() - {"gpu/CONTENTS.txt"}
    wanted = ("wheels/av-1-3.12.whl", "cache/clips/made.mp4", f"cache/bench/gpu_plans/made{gpu_plans.SUFFIX}")
    wanted += ("code/keye/encoder.py", "code/tests/conftest.py", "code/pyproject.toml", "code/scripts/clips.py")
    assert all(f"gpu/{name}" in names for name in wanted)
    assert names["gpu/run.sh"].mode & 0o100 and {entry.uname for entry in names.values()} == {"root"}
    assert not any("code/docs/" in name for name in names)


def test_its_script_installs_continues_from_results_and_starts_the_parts(packed, tmp_path) -> None:
    with tarfile.open(packed) as archive:
        archive.extractall(tmp_path, filter="data")
    (tmp_path / "earlier" / "gpu").mkdir(parents=True)
    (tmp_path / "earlier" / "gpu" / "made.json").write_text("{}")
    (tmp_path / "out").mkdir()
    with tarfile.open(tmp_path / "out" / "results.tar", "w") as archive:
        archive.add(tmp_path / "earlier" / "gpu", "gpu")
    python = tmp_path / "python"
    script = '#!/bin/bash\nif [ "$2" = pip ]; then mkdir -p "${@: -2:1}"; fi\necho "$PWD|$PYTHONPATH|$*" >>%s/calls\n'
    python.write_text(script % tmp_path)
    python.chmod(0o755)
    command = ["bash", "gpu/run.sh", "out", "b c", "--small", "--device", "cpu"]
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHON": str(python)}
    environment |= {"PIP_TARGET": str(tmp_path / "gpu" / "site")}
    (tmp_path / "gpu" / "site").mkdir()
    for _ in range(2):
        subprocess.run(command, check=True, cwd=tmp_path, env=environment)
    calls = [line.split("|") for line in (tmp_path / "calls").read_text().splitlines()]
    assert [" pip install" in call[2] for call in calls] == [True, False, False]  # once
    assert str(tmp_path / "gpu" / "wheels" / "av-1-3.12.whl") in calls[0][2]
    code, site, results = (tmp_path / "gpu" / name for name in ("code", "site", "results"))
    for call in calls[1:]:
        assert call[:2] == [str(code), f"{code}:{site}"]
        words = call[2].split()
        assert words[:5] == ["-m", "scripts.bench.gpu", "--part", "b", "c"]
        assert words[-3:] == ["--small", "--device", "cpu"] and words[words.index("--out") + 1] == f"{results}/gpu"
        assert words[words.index("--bundle") + 1] == str(tmp_path / "out" / "results.tar")
        assert 0 <= time.time() - float(words[words.index("--since") + 1]) < 600
    assert (results / "gpu" / "made.json").exists() and (code / ".cache" / "clips" / "made.mp4").exists()
    (tmp_path / "nothing").mkdir()
    subprocess.run(command, check=True, cwd=tmp_path, env=environment | {"CODE": str(tmp_path / "nothing")})
    assert (tmp_path / "calls").read_text().splitlines()[-1].startswith(f"{tmp_path}/nothing|{tmp_path}/nothing:")


def test_pip_installs_a_wheel_that_was_compressed_again(tmp_path, monkeypatch) -> None:
    wheel, info = tmp_path / "made-1-py3-none-any.whl", "made-1.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("made.py", "VALUE = 7\n" + "#" * 10_000)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: made\nVersion: 1\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    assert gpu_pack.smaller(wheel, tmp_path / "again") == wheel  # too small to be worth it
    monkeypatch.setattr(gpu_pack, "LARGE", 100)
    found = gpu_pack.smaller(wheel, tmp_path / "again")
    assert found.name == wheel.name and found.stat().st_size < wheel.stat().st_size / 4
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target"]
    subprocess.run([*command, str(tmp_path / "site"), str(found)], check=True, timeout=120)
    assert (tmp_path / "site" / "made.py").read_text().startswith("VALUE = 7")


def test_new_files_of_a_checkout_travel_and_ignored_ones_do_not() -> None:
    new, ignored = (record.ROOT / "scripts" / "bench" / f"made_{os.getpid()}{end}" for end in (".py", ".egg-info/made"))
    try:
        ignored.parent.mkdir()
        for path in (new, ignored):
            path.write_text("")
        found = gpu_pack.checkout(*gpu_pack.TREES)
    finally:
        new.unlink(missing_ok=True)
        shutil.rmtree(ignored.parent)
    assert new in found and ignored not in found


def test_an_archive_that_is_too_large_is_refused(packed, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(gpu_pack, "LIMIT", 1 << 10)
    large = tmp_path / "large"
    large.write_bytes(b"x" * 4096)
    with pytest.raises(KeyeError, match="most of it is plans"):
        gpu_pack.write(tmp_path / "other.tar", {"plans": [(large, "large")]}, [])
    assert not (tmp_path / "other.tar").exists()


def test_estimates_leave_cells_empty_until_a_gpu_has_measured(tmp_path) -> None:
    row = estimates.Row("training", "ZeRO-2, plain", 15, 16_384, 9e10, 1.4)
    assert estimates.measured(tmp_path, row) == ("", "")
    lines = [{"device": "a GPU", "small": True}, {"key": row.key, "state": "begun"}]
    lines.append({"key": row.key, "state": "done", "values": {"peak": 91.2, "seconds": 1.52}})
    path = tmp_path / "rows" / "training.jsonl"
    path.parent.mkdir()
    for small, expected in ((True, ("", "")), (False, ("91", "1.5"))):
        lines[0]["small"] = small
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert estimates.measured(tmp_path, row) == expected


def test_a_step_is_estimated_for_the_tokens_that_it_has() -> None:
    work = estimates.work_of(2, 1000, 0.7)
    visual = work.patches // 4
    assert sum(work.documents) == 2000 and visual == 4 * 230  # two frames of 230 tokens in each document
    assert work.labels == 2 * (1000 - 1 - 2 * 230)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["training", "context", "encoder", "gspo", "recipe"])
def test_a_part_on_the_path_of_a_run_runs_small(part, tmp_path, plans) -> None:
    command = [sys.executable, "-m", f"scripts.bench.gpu.parts.{part}", "--small", "--device", "cpu"]
    subprocess.run([*command, "--out", str(tmp_path), "--plans", str(plans)], check=True, cwd=record.ROOT)
    found = json.loads((tmp_path / f"{part}.json").read_text())
    tables = {table["title"]: table["rows"] for table in found["tables"]}
    failed = [row[0] for row in tables.get("Failed or not measured", [])]
    assert all(row.startswith("decoding with NVDEC") for row in failed) and found["claims"] == []
    if part == "training":  # the same weights and packs in every setting
        losses = {row[-1].split(", ")[0] for row in found["tables"][-1]["rows"]}
        assert len(losses) == 1
