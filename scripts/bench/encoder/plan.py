"""Time and memory of a complete plan of a long 720p film, compared with the release and with bare decoding.

Every measurement runs in its own process, so that memory peaks are separate; the contenders alternate, and ratios are
medians over the rounds. Bare decoding decodes every frame without using it, with the fastest threading of PyAV; decord,
which always converts to RGB, is listed too. Imports are not timed; their memory is counted.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from keye.errors import run
from scripts.bench.common.process import in_process, resident
from scripts.bench.common.record import Claim, Table, arguments, out_of, save
from scripts.bench.encoder.media.corpus import FOLDER
from scripts.bench.encoder.media.films import film
from scripts.bench.encoder.media.released import load_released

BARE = ("bare AUTO", "bare FRAME", "bare SLICE")
NAMES = {
    "ours": "our plan, default settings",
    "ours released": "our plan, settings of the release",
    "encode": "our plan and pixels, default settings",
    "released": "keye-vl-utils 1.5.2, fetch_video",
    "bare AUTO": "bare decoding, PyAV, threads AUTO",
    "bare FRAME": "bare decoding, PyAV, threads FRAME",
    "bare SLICE": "bare decoding, PyAV, threads SLICE",
    "decord": "bare decoding, decord",
}


def contender(name: str, path: Path) -> Callable[[], dict]:
    """The timed function of a worker process: it opens the film; imports happen before."""
    if name in ("ours", "ours released", "encode"):
        from keye import SlowFastEncoder

        encoder = SlowFastEncoder.released() if name == "ours released" else SlowFastEncoder()
        if name == "encode":
            return lambda: _figures(encoder(path).plan)
        return lambda: _figures(encoder.plan(path))
    if name == "released":
        released = load_released()
        import decord  # noqa: F401  (the release imports it when it first reads; that is not timed)

        return lambda: _released_figures(released.fetch_video({"video": str(path)})[1])
    if name == "decord":
        load_released()
        import decord

        return lambda: {"decoded": sum(1 for _ in decord.VideoReader(str(path)))}
    return lambda: _bare(path, name.removeprefix("bare "))


def _figures(plan) -> dict:
    return {"frames": len(plan), "slow": int((plan.frame_types == 0).sum()), "tokens": plan.tokens}


def _released_figures(kwargs: dict) -> dict:
    slow = int((kwargs["frame_types"] == 0).sum())
    fast = len(kwargs["frame_types"]) - slow
    sizes = ("height", "width"), ("fast_height", "fast_width")
    of_slow, of_fast = ((kwargs[height] // 28) * (kwargs[width] // 28) for height, width in sizes)
    return {"frames": slow + fast, "slow": slow, "tokens": slow * of_slow + fast * of_fast}


def _bare(path: Path, threads: str) -> dict:
    import av

    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = threads
        return {"decoded": sum(1 for _ in container.decode(video=0))}


def peak_mb() -> float:
    """Peak memory of this process, MB."""
    return resident("VmHWM") / 2**20


def work(name: str, path: Path) -> None:
    """In a worker: time one contender once and print what it cost as JSON."""
    action = contender(name, path)
    before, began, cpu = peak_mb(), time.perf_counter(), time.process_time()
    figures = action()
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    print(json.dumps({"seconds": seconds, "cpu": cpu, "imports_mb": before, "peak_mb": peak_mb(), **figures}))


def measure(name: str, path: Path, turn: int = 0) -> dict:
    """One contender on one film in a fresh process: seconds, CPU seconds, MB at the peak, and its figures.

    What was measured is kept as it comes; there a bench that was stopped finds it again (`--resume`).
    """
    kept = rounds_of(path)
    known = [json.loads(line) for line in kept.read_text().splitlines()] if kept.is_file() else []
    for one in known:
        if (one["name"], one["turn"]) == (name, turn):
            return one
    found = in_process(__spec__.name, ["--worker", name, "--film", str(path)], f"{NAMES[name]} on {path.name}")
    print(f"  {path.name:24} {NAMES[name]:40} {found['seconds']:7.1f} s {found['peak_mb']:7.0f} MB", flush=True)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with kept.open("a") as file:
        file.write(json.dumps({"name": name, "turn": turn, **found}) + "\n")
    return found


def rounds_of(path: Path) -> Path:
    """Where the rounds of a film are kept."""
    return FOLDER / "rounds" / f"{path.stem}.jsonl"


class Race:
    """The rounds of one film: name → what each round measured."""

    def __init__(self, path: Path, rounds: int, released_rounds: int):
        self.path = path
        self.rounds: dict[str, list[dict]] = {}
        names = ["ours", *BARE, "ours released", "decord"]
        for turn in range(rounds):
            once = [*names, *(["released"] if turn < released_rounds else [])]
            # Each round starts elsewhere, so that no contender always comes after the same one.
            for name in once[turn % len(once) :] + once[: turn % len(once)]:
                self.rounds.setdefault(name, []).append(measure(name, path, turn))
        self.rounds["encode"] = [measure("encode", path)]

    def seconds(self, name: str) -> list[float]:
        return [turn["seconds"] for turn in self.rounds[name]]

    def peak(self, name: str) -> float:
        """MB, the highest of the rounds."""
        return max(turn["peak_mb"] for turn in self.rounds[name])

    @property
    def bare(self) -> str:
        """The fastest way of bare decoding, by the median."""
        return min(BARE, key=lambda name: statistics.median(self.seconds(name)))

    def ratio(self, over: str, under: str) -> float:
        """The median over the rounds of the time of one over that of the other in the same round."""
        pairs = zip(self.seconds(over), self.seconds(under), strict=False)
        return statistics.median(a / b for a, b in pairs)

    def rows(self) -> list[Sequence[str | int | float]]:
        found = []
        for name, turns in self.rounds.items():
            seconds = self.seconds(name)
            spread = f"{min(seconds):.1f}–{max(seconds):.1f}" if len(seconds) > 1 else "–"
            cpu = statistics.median(turn["cpu"] for turn in turns)
            figures = [turns[-1].get(key, "") for key in ("frames", "slow", "tokens", "decoded")]
            median = f"{statistics.median(seconds):.1f}"
            found.append(
                (
                    NAMES[name],
                    len(turns),
                    median,
                    spread,
                    f"{cpu:.1f}",
                    f"{self.peak(name):.0f}",
                    *figures,
                )
            )
        return found


COLUMNS = ("what", "rounds", "median s", "range", "CPU s", "peak MB", "frames", "slow", "tokens", "decoded")


def claims_of(race: Race, bframes: bool, minutes: str) -> list[Claim]:
    """The claims about a film with or without B-frames."""
    about = f"{minutes} film {'with' if bframes else 'without'} B-frames"
    found = []
    for name, settings in (("ours", "default"), ("ours released", "released")):
        faster, over = race.ratio("released", name), race.ratio(name, race.bare)
        theirs, own = (statistics.median(race.seconds(key)) for key in ("released", name))
        found.append(
            Claim(
                f"whole plan, {about}, {settings} settings, against keye-vl-utils",
                "≥ 3 × faster",
                f"{own:.1f} s against {theirs:.1f} s",
                f"{faster:.2f} ×",
                faster >= 3,
            )
        )
        most = 1.0 if bframes else 1.25
        found.append(
            Claim(
                f"whole plan, {about}, {settings} settings, against bare decoding",
                "< 1 × its time" if bframes else "≤ 1.25 × its time",
                f"{own:.1f} s against {statistics.median(race.seconds(race.bare)):.1f} s ({race.bare[5:]})",
                f"{over:.2f} ×",
                over < most if bframes else over <= most,
            )
        )
        peak, released_peak = race.peak(name), race.peak("released")
        figure = f"{peak:.0f} MB against {released_peak:.0f} MB"
        found.append(
            Claim(
                f"peak memory, {about}, {settings} settings",
                "≤ 1 GB",
                figure,
                f"{released_peak / peak:.1f} × less",
                peak <= 1024,
            )
        )
    return found


def hour_claims(hours: dict[str, dict], short: Race) -> list[Claim]:
    """The claims about the long film against the short one."""
    found = []
    for name, turn in hours.items():
        peak, ratio = turn["peak_mb"], turn["peak_mb"] / short.peak(name)
        settings = "default" if name == "ours" else "released"
        figure = f"{peak:.0f} MB, the shorter film {short.peak(name):.0f} MB; {turn['seconds']:.0f} s"
        claim = f"peak memory of the plan of a film six times as long, {settings} settings"
        found.append(Claim(claim, "the same, ≤ 1 GB", figure, f"{ratio:.2f} ×", ratio <= 1.1 and peak <= 1024))
    return found


def hour_table(hours: dict[str, dict]) -> Table:
    """What planning the long film takes, by contender."""
    keys = ("seconds", "cpu", "peak_mb", "frames", "slow", "tokens")
    rows = [
        (NAMES[name], *(round(turn[key], 1) if key in turn else "" for key in keys)) for name, turn in hours.items()
    ]
    columns = ("what", "s", "CPU s", "peak MB", "frames", "slow", "tokens")
    return Table("The film six times over (an hour), packets copied", columns, rows)


def bench(args: argparse.Namespace) -> None:
    """Race on both films, then plan the long one, and write the results."""
    began = time.monotonic()
    seconds, size, minutes = (12, (180, 320), "12-second") if args.quick else (600, (720, 1280), "10-minute 720p")
    load_released()
    long = film(seconds * 6, False, size)
    films = {bframes: film(seconds, bframes, size) for bframes in (False, True)}
    if not args.resume:
        for path in (*films.values(), long):
            rounds_of(path).unlink(missing_ok=True)
    races = {}
    claims: list[Claim] = []
    tables: list[Table] = []
    for bframes in films:
        race = races[bframes] = Race(films[bframes], args.rounds, args.released_rounds)
        claims += claims_of(race, bframes, minutes)
        tables.append(Table(f"{minutes} film {'with' if bframes else 'without'} B-frames", COLUMNS, race.rows()))
    hours = {name: measure(name, long) for name in ("ours", "ours released")}
    claims += hour_claims(hours, races[False])
    tables.append(hour_table(hours))
    notes = [
        "Peaks hold what is imported before anything is read: "
        + ", ".join(f"{NAMES[name]} {turns[0]['imports_mb']:.0f} MB" for name, turns in races[False].rounds.items())
        + "."
    ]
    for bframes, race in races.items():
        share = statistics.median(race.seconds(race.bare)) / statistics.median(race.seconds("released"))
        kind = "with" if bframes else "without"
        notes.append(
            f"{kind.capitalize()} B-frames, bare decoding alone takes {share:.0%} of the release's time here; only what"
            " need not be decoded can bring a plan below that."
        )
    took = time.monotonic() - began
    save(out_of(args), "plan", claims, tables, seconds=took, quick=args.quick, seeds={"films": 3}, notes=notes)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of ours and of bare decoding (default 3)")
    parser.add_argument("--released-rounds", type=int, default=2, help="of them with the release (default 2)")
    parser.add_argument("--resume", action="store_true", help="resume an interrupted bench")
    parser.add_argument("--worker", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--film", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.worker, args.film)
    bench(args)


if __name__ == "__main__":
    run(main)
