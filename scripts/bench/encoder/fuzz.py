"""Plans thousands of damaged files in monitored worker processes.

A failure is a worker that dies (crash), a file that takes more than 10 seconds of processor time (hang), an exception
other than VideoError, an invalid plan, or a worker that has grown by more than 50 MB at the end (leak). Files that fail
are kept in runs/fuzz. The run can be interrupted and resumed; it ends after --minutes at the latest.

    python -m scripts.bench.encoder.fuzz --files 5000 --seed 0
    python -m scripts.bench.encoder.fuzz --file runs/fuzz/crash_0_17_h264.mp4    # one file, in this process
"""

import ctypes
import ctypes.util
import faulthandler
import gc
import io
import json
import math
import os
import resource
import select
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from keye.files import write_atomically
from scripts.bench.common.record import ROOT, Claim, Table, arguments, out_of, save
from scripts.bench.encoder.media.mutations import mutate, seed_files

KEPT = ROOT / "runs" / "fuzz"
HANG = 10.0  # seconds of processor time
STUCK = 60.0  # seconds by the clock; a busy machine may need some for ten of its own
LEAK = 50 << 20  # bytes
BATCH = 250  # files between two looks at a worker's memory
LIFE = 5  # batches that a worker lives
ADDRESSES = 8 << 30  # bytes of address space of a worker: what a file claims to need beyond it is refused to it
FAULTS = ("crash", "hang", "exception", "wrong", "leak")


@dataclass
class State:
    """The results so far, saved after every batch."""

    seed: int
    files: int
    batches: list[int] = field(default_factory=list)  # those finished
    outcomes: dict[str, int] = field(default_factory=dict)
    damage: dict[str, int] = field(default_factory=dict)
    formats: dict[str, list[int]] = field(default_factory=dict)  # name of the seed file: [planned, refused]
    faults: list[dict] = field(default_factory=list)
    slowest: float = 0.0  # seconds of processor time of one file
    grown: float = 0.0  # bytes, the most that a worker grew
    peak: int = 0  # bytes, the most memory that a worker held
    seconds: float = 0.0


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--files", type=int, default=5000, help="how many damaged files (5000)")
    parser.add_argument("--seed", type=int, default=0, help="what the damage is drawn with (0)")
    parser.add_argument("--minutes", type=float, default=20.0, help="stop after so long, to be resumed (20)")
    parser.add_argument("--resume", action="store_true", help="resume the last run of this seed")
    parser.add_argument("--workers", type=int, default=2, help="worker processes (2)")
    parser.add_argument("--file", type=Path, help="only plan this file and say what happens")
    parser.add_argument("--worker", action="store_true", help="what the workers are started with; not for you")
    args = parser.parse_args()
    if args.worker:
        return work(args.seed)
    if args.file:
        print(json.dumps(plan_one(args.file.read_bytes(), args.file.name, 0), indent=1))
        return 0
    files = 250 if args.quick else args.files
    state = run(files, args.seed, args.minutes, resume=args.resume, workers=args.workers)
    publish(state, out_of(args), args.quick)
    return 0 if not state.faults else 1


def run(files: int, seed: int, minutes: float, *, resume: bool, workers: int) -> State:
    """Plan the damaged files 0 … files - 1 of a seed with several workers, for a limited number of minutes."""
    seed_files(KEPT / "seeds")
    path = KEPT / f"state_{seed}.json"
    state = State(seed, files)
    if resume and path.exists():
        state = State(**json.loads(path.read_text(encoding="utf-8")))
        state.files = files
    began, until = time.monotonic() - state.seconds, time.monotonic() + 60 * minutes
    todo = [batch for batch in range(math.ceil(files / BATCH)) if batch not in state.batches]
    lock = threading.Lock()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn()) as progress:
        task = progress.add_task("0 faults", total=files, completed=min(files, len(state.batches) * BATCH))

        def serve() -> None:
            worker = None
            while True:
                with lock:
                    if not todo or time.monotonic() > until:
                        break
                    batch = todo.pop(0)
                worker = worker if worker is not None and worker.batches < LIFE else _renew(worker, seed)
                found = []
                for index in range(batch * BATCH, min(files, (batch + 1) * BATCH)):
                    found.append(worker.plan(index))
                    progress.update(task, advance=1, description=f"{len(state.faults)} faults")
                    if found[-1]["outcome"] in ("crash", "hang"):
                        worker = _renew(worker, seed)
                found.append(worker.memory())
                with lock:
                    _note(state, batch, found)
                    state.seconds = time.monotonic() - began
                    write_atomically(path, json.dumps(asdict(state), indent=1))
            if worker is not None:
                worker.close()

        threads = [threading.Thread(target=serve) for _ in range(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return state


def _note(state: State, batch: int, found: list[dict]) -> None:
    outcomes, damage = Counter(state.outcomes), Counter(state.damage)
    for one in found:
        if one["outcome"] == "memory":
            state.grown, state.peak = max(state.grown, one["grown"]), max(state.peak, one["peak"])
            if one["grown"] > LEAK:
                outcomes["leak"] += 1
                state.faults.append({"outcome": "leak", "batch": batch, "detail": f"{one['grown'] / 2**20:.0f} MB"})
            continue
        outcomes[one["outcome"]] += 1
        damage.update(one.get("damage", "").split("+"))
        state.slowest = max(state.slowest, one.get("seconds", 0.0))
        counts = state.formats.setdefault(one.get("file", "?"), [0, 0])
        counts[one["outcome"] != "planned"] += 1
        if one["outcome"] in FAULTS:
            state.faults.append(one | _keep(state.seed, one))
    state.outcomes, state.damage = dict(outcomes), dict(damage)
    state.batches.append(batch)


def _keep(seed: int, one: dict) -> dict:
    """Write the failing file to runs/fuzz: {"kept": its name, …}."""
    paths = seed_files(KEPT / "seeds")
    which, content, damage = mutate([path.read_bytes() for path in paths], seed, one["index"])
    kept = f"{one['outcome']}_{seed}_{one['index']}_{paths[which].name}"
    (KEPT / kept).write_bytes(content)
    return {"kept": kept, "damage": damage, "file": paths[which].name}


class Worker:
    """A monitored process that plans files."""

    def __init__(self, command: Sequence[str]):
        """command: its command line; the worker is ready when it has written a first line."""
        KEPT.mkdir(parents=True, exist_ok=True)
        self.log = open(KEPT / f"worker_{os.getpid()}_{threading.get_ident()}.log", "ab")  # noqa: SIM115
        # Large blocks go back to the system when they are freed: what a worker has grown by then is what it holds, not
        # what the allocator keeps in reserve (up to 150 MB after a few frames of 4000 pixels, and no more after many).
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
        self.process = subprocess.Popen(command, env=environment, **pipes)
        self.batches = 0
        self.ready = self._answer(120.0, math.inf)["outcome"] == "ready"

    def plan(self, index: int, stuck: float = STUCK, hang: float = HANG) -> dict:
        """What became of the file of this index; a "hang" after so many seconds by the clock or of work."""
        answer = self._ask(f"{index}\n", stuck, hang)
        return {"index": index, **answer}

    def memory(self) -> dict:
        self.batches += 1
        answer = self._ask("memory\n", STUCK, math.inf)
        return answer if answer["outcome"] == "memory" else {**answer, "index": -1}

    def _ask(self, line: str, patience: float, work: float) -> dict:
        try:
            self.process.stdin.write(line.encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        return self._answer(patience, work)

    def _answer(self, patience: float, work: float) -> dict:
        """The next line; "hang" after so many seconds by the clock or of processor time, "crash" at the end."""
        began, spent = time.monotonic(), self._spent()
        while not select.select([self.process.stdout], [], [], 0.5)[0]:
            used = self._spent() - spent
            if time.monotonic() - began > patience or used > work:
                self.process.kill()
                self.process.wait()
                return {"outcome": "hang", "seconds": used, "detail": f"{time.monotonic() - began:.0f} s by the clock"}
        line = self.process.stdout.readline()
        if not line:
            return {"outcome": "crash", "detail": f"exit code {self.process.wait()}"}
        answer = json.loads(line)
        return {"seconds": round(self._spent() - spent, 3), **answer}

    def _spent(self) -> float:
        """Seconds of processor time of the process and its threads."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except (OSError, IndexError):
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.stdin.close()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process.stdout.close()
        self.log.close()
        for left in KEPT.glob(f"now_{self.process.pid}_*"):  # what a worker that died was reading
            left.unlink()
        log = Path(self.log.name)
        if log.exists() and log.stat().st_size == 0:
            log.unlink()


def _renew(worker: Worker | None, seed: int) -> Worker:
    if worker is not None:
        worker.close()
    worker = Worker([sys.executable, "-m", __spec__.name, "--worker", "--seed", str(seed)])
    if not worker.ready:
        raise RuntimeError(f"a worker does not start; {worker.log.name} says why")
    return worker


def work(seed: int) -> int:
    """The worker: reads an index per line from stdin and writes a result per line to stdout."""
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    paths = seed_files(KEPT / "seeds")
    files = [path.read_bytes() for path in paths]
    for path, content in zip(paths, files, strict=True):  # what is loaded once, and the buffers of a size, are no leak
        for way in (0, 7):
            found = plan_one(content, path.name, way)
            if found["outcome"] != "planned":
                print(f"undamaged {path.name}: {found}", file=sys.stderr)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    held = _held()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    print(json.dumps({"outcome": "ready"}), file=answers)
    for line in sys.stdin:
        if line == "memory\n":
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
            print(json.dumps({"outcome": "memory", "grown": _held() - held, "peak": peak}), file=answers)
            continue
        which, content, damage = mutate(files, seed, int(line))
        found = plan_one(content, paths[which].name, int(line))
        print(json.dumps({"damage": damage, "file": paths[which].name, **found}), file=answers)
    return 0


def plan_one(content: bytes, name: str, way: int) -> dict:
    """Plan one file, in one of the ways to give it; {"outcome": planned | refused | exception | wrong, "detail": …}."""
    from keye import SlowFastEncoder
    from keye.errors import VideoError

    encoder = SlowFastEncoder(fps=6.0, max_tokens=4096)
    options = ({}, {"num_frames": 5}, {"start": 0.5, "end": 1.5}, {})[way // 2 % 4]
    path = KEPT / f"now_{os.getpid()}_{name}"
    try:
        if way % 2:
            path.write_bytes(content)
        # Every eighth file is encoded, too: a plan keeps no frame, an encoding does.
        read = encoder if way % 8 == 7 else encoder.plan
        made = read(path if way % 2 else io.BytesIO(content), **options)
        plan = getattr(made, "plan", made)
        problem = "; ".join(_wrong(plan))
        return {"outcome": "wrong" if problem else "planned", "detail": problem}
    except VideoError as error:
        return {"outcome": "refused", "detail": str(error)[:300]}
    except Exception as error:
        return {"outcome": "exception", "detail": f"{type(error).__name__}: {error}"[:600]}
    finally:
        path.unlink(missing_ok=True)


def _wrong(plan: object) -> Iterator[str]:
    """The reasons why a plan is invalid."""
    times = plan.timestamps.tolist()
    if not times:
        yield "no frame"
    if any(not math.isfinite(time) for time in times) or any(b <= a for a, b in zip(times, times[1:], strict=False)):
        yield "times do not ascend"
    if plan.similarity[1:].isnan().any():  # the first frame is compared with none
        yield "a score is not a number"
    if plan.tokens > plan.max_tokens:
        yield f"{plan.tokens} tokens of {plan.max_tokens}"
    if not 0 <= plan.duration < 1e9:
        yield f"a duration of {plan.duration} s"


def _held() -> int:
    """Bytes of memory in use, after freeing what can be freed."""
    gc.collect()
    if ctypes.util.find_library("c"):
        getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def publish(state: State, out: Path, quick: bool) -> None:
    """Write the part's JSON and print its claims."""
    done = sum(state.outcomes.get(kind, 0) for kind in ("planned", "refused", *FAULTS[:4]))
    whole = done >= state.files and not quick

    def claim(kind: str, text: str, figure: str | None = None) -> Claim:
        count = state.outcomes.get(kind, 0)
        return Claim(text, "0", figure or f"{count} of {done:,} files", met=(count == 0) if whole or count else None)

    leak = f"{state.outcomes.get('leak', 0)}; the most a worker grew: {state.grown / 2**20:.0f} MB"
    claims = [
        claim("crash", "Damaged files that end the process"),
        claim("hang", "Damaged files that take over 10 s of processor time"),
        claim("exception", "Damaged files with an error other than VideoError"),
        claim("wrong", "Damaged files with an invalid plan"),
        claim("leak", "Workers that grew by more than 50 MB over 1,250 files", leak),
    ]
    rows = [(name, planned, refused) for name, (planned, refused) in sorted(state.formats.items())]
    tables = [Table("Damaged files by the file they were", ("file", "planned", "refused or at fault"), rows)]
    tables.append(Table("Damage done (up to three kinds a file)", ("damage", "files"), sorted(state.damage.items())))
    if state.faults:
        faults = [(one["outcome"], one.get("kept", ""), one.get("detail", "")[:200]) for one in state.faults[:20]]
        tables.append(Table("Faults", ("kind", "file kept", "what"), faults))
    notes = [
        f"The slowest file took {state.slowest:.1f} s of processor time; the most memory a worker held was"
        f" {state.peak / 2**20:.0f} MB; each may use {ADDRESSES >> 30} GB of addresses. A worker's growth is measured"
        " with MALLOC_MMAP_THRESHOLD_=131072, so that it is memory held and not the allocator's reserve."
    ]
    save(out, "fuzz", claims, tables, seconds=state.seconds, quick=quick, seeds={"damage": state.seed}, notes=notes)


if __name__ == "__main__":
    sys.exit(main())
