"""GSPO with a judge that is healthy, down for a while, rate limiting, slow, lying, silent or gone: what is lost?

A tiny decoder is tuned on sums, with the same seed in each case. The only reward is a judge behind a real HTTP server
of this machine, whose score falls with the distance from the right sum. It misbehaves after the first held-out
questions.
"""

import contextlib
import io
import json
import re
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from keye.errors import run
from rl.recipe import Gspo, HeldOut, RlRecipe
from rl.trainer import GspoTrainer
from scripts.bench.common.record import ROOT, Claim, Table, arguments, out_of, save
from scripts.bench.rl.trl import make_start

EXAMPLES = """examples:
  python -m scripts.bench rl --part judges     about three minutes on one core
  python -m scripts.bench.rl.judges --quick    two steps of each case: shows that it runs
"""
SCRATCH = ROOT / ".cache" / "bench" / "rl_judges"
PROMPTS, GROUP, NEW_TOKENS, SEED = 16, 8, 4, 0
OUTAGE = 4.0
"""Seconds in which the judge that is down for a while refuses connections."""
CURVE = ("reward_mean", "reward/judge", "loss", "grad_norm", "entropy")
LIES = ('{"score": 11}', '{"score": -1}', "The score is 10.", '{"score": true}', "", '{"score": 10')


class Judge:
    """An OpenAI-compatible judge on a port of this machine.

    Attributes:
        behave: request number → what to do: "verdict", "lie", "429", "slow" or "silent". counts: of requests.
    """

    def __init__(self, behave: Callable[[int], str]) -> None:
        self.behave, self.counts = behave, Counter[str]()
        self.lock, self.released = threading.Lock(), threading.Event()
        self.http: ThreadingHTTPServer | None = None
        self.port = 0
        self.up()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def up(self) -> None:
        """Listen, on the same port as before."""
        self.http = _Server(("127.0.0.1", self.port), _handler(self))
        self.port = self.http.server_port
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def down(self) -> None:
        """Refuse connections."""
        self.http.shutdown()
        self.http.server_close()

    def close(self) -> None:
        self.released.set()
        self.down()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128


def _handler(judge: Judge) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            if not raw:  # the client gave up
                return
            request = json.loads(raw)
            with judge.lock:
                number = judge.counts["requests"]
                judge.counts["requests"] += 1
                what = judge.behave(number)
                judge.counts[what] += 1
            if what == "silent":
                judge.released.wait()
                return
            if what == "slow":
                judge.released.wait(0.05)
            text = LIES[number % len(LIES)] if what == "lie" else verdict(request["messages"][-1]["content"])
            body = {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}
            data = json.dumps(body).encode()
            self.send_response(429 if what == "429" else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            if what == "429":
                self.send_header("Retry-After", "0.1")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    return Handler


def verdict(prompt: str) -> str:
    """The verdict of a healthy judge on the prompt of `rl.rewards.judge`: 10 for the right sum, less for a near one."""
    _, right, given = (json.loads(line) for line in prompt.splitlines() if line.startswith('"'))
    distance = abs(int(given) - int(right)) if given.strip().isdecimal() else 10
    return json.dumps({"reason": f"the distance is {distance}", "score": max(0, 10 - distance)})


@dataclass(frozen=True)
class Case:
    """A behaviour of the judge.

    behave: see `Judge`, once the first held-out questions are answered. equal: whether the curve must be the healthy
    one's. judge: options of the reward. outage: seconds without a server from the first step on, infinite for always.
    """

    name: str
    behave: Callable[[int], str]
    equal: bool
    judge: dict[str, Any] = field(default_factory=dict)
    outage: float = 0.0


def _always(what: str) -> Callable[[int], str]:
    return lambda number: what


WAITING = {"timeout": 5.0, "patience": 120.0, "wait": 0.1}
LEAVING = {"timeout": 0.5, "patience": 0.5, "wait": 0.1}
CASES = (
    Case("healthy", _always("verdict"), True, WAITING),
    Case("down for a while", _always("verdict"), True, WAITING, OUTAGE),
    Case("rate limiting", lambda number: "429" if number % 3 else "verdict", True, WAITING),
    Case("slow, within the time limit", _always("slow"), True, WAITING),
    Case("lying in half of its replies", lambda number: "lie" if number % 2 else "verdict", False, WAITING),
    Case("lying always", _always("lie"), False, WAITING),
    Case("silent", _always("silent"), False, LEAVING),
    Case("gone", _always("verdict"), False, LEAVING, float("inf")),
)


def recipe(case: Case, url: str, steps: int) -> RlRecipe:
    """A recipe whose only reward is the judge."""
    gspo = Gspo(
        steps=steps, learning_rate=2e-4, prompts=PROMPTS, group_size=GROUP, mini_batches=2, max_new_tokens=NEW_TOKENS,
        checkpoint_every=steps, freeze=("visual",), precision="fp32",
    )  # fmt: skip
    table = {"url": url, "model": "judge", **case.judge}
    return RlRecipe(gspo=gspo, heldout=HeldOut(limit=4, samples=1), rewards={"judge": table}, seed=SEED)


def measure(case: Case, start: Path, folder: Path, steps: int) -> dict[str, Any]:
    """Train one case; its metrics by step, the judge's counts and the seconds."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(start, folder)
    before = folder / "gspo/before.jsonl"
    judge = Judge(lambda number: case.behave(number) if before.exists() else "verdict")
    stop = threading.Thread(target=_outage, args=(judge, before, case.outage), daemon=True)
    said: list[str] = []
    began = time.perf_counter()
    try:
        trainer = GspoTrainer(recipe(case, judge.url, steps), folder)
        if case.outage:
            stop.start()
        with contextlib.redirect_stdout(_Copied(sys.stdout, said)):
            trainer.train()
    finally:
        judge.released.set()
        stop.join() if stop.is_alive() else None
        judge.close()
    rows = [json.loads(line) for line in (folder / "gspo/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds = time.perf_counter() - began
    return {"rows": rows, "counts": dict(judge.counts), "said": said, "seconds": seconds}


class _Copied(io.TextIOBase):
    """The standard output, whose lines about the judge are kept in `said`."""

    def __init__(self, out: Any, said: list[str]) -> None:
        self.out, self.said = out, said

    def write(self, text: str) -> int:
        self.said += [line for line in text.splitlines() if line.startswith("judge at")]
        return self.out.write(text)

    def flush(self) -> None:
        self.out.flush()


def _outage(judge: Judge, before: Path, seconds: float) -> None:
    """Take the judge down when the held-out questions are answered, for some seconds or until the end."""
    while not before.exists():
        if judge.released.wait(0.002):
            return
    judge.down()
    judge.released.wait(None if seconds == float("inf") else seconds)
    judge.up()


def row_of(case: Case, found: dict[str, Any], healthy: dict[str, Any]) -> list[str | int]:
    """A case as a row of the table."""
    rows, counts, each = found["rows"], found["counts"], PROMPTS * GROUP
    failed = sum(int(row.get("reward_failures/judge", 0)) for row in rows)
    unread = sum(round((1 - row["finished"]) * each) + round(row["empty"] * each) for row in rows)
    warned = [text for row in rows for text in row.get("warnings", []) if "judge" in text]
    said = next(iter([*warned, *found["said"]]), "–")
    judged = len(rows) * each - failed - unread
    wrong = counts["requests"] - counts.get("verdict", 0) - counts.get("slow", 0)
    same = "yes" if curve(found) == curve(healthy) else "no"
    return [case.name, len(rows), judged, failed, unread, counts["requests"], wrong, same, f"{found['seconds']:.1f}",
            re.sub(r" at http://\S+/v1", "", said)[:160]]  # fmt: skip


def curve(found: dict[str, Any]) -> list[list[float]]:
    """What must be the same in two runs of which nothing is lost, for each step."""
    return [[row.get(name) for name in CURVE] for row in found["rows"]]


def claims(steps: int, found: dict[str, dict[str, Any]]) -> list[Claim]:
    """All runs finish; the curve is the healthy one's where nothing may be lost; nothing is paid without a verdict."""
    finished = sum(len(one["rows"]) == steps for one in found.values())
    kept = [case.name for case in CASES if case.equal and curve(found[case.name]) == curve(found["healthy"])]
    wanted = [case.name for case in CASES if case.equal]
    silent = [found[name]["rows"] for name in ("lying always", "silent", "gone")]
    paid = max(abs(row["reward/judge"]) for rows in silent for row in rows)
    return [
        Claim("runs that finish all steps", f"{len(CASES)} of {len(CASES)}", f"{finished} of {len(CASES)}",
              met=finished == len(CASES)),
        Claim("runs whose curve is exactly the healthy one's: " + ", ".join(wanted[1:]), f"{len(wanted) - 1}",
              f"{len(kept) - 1}", met=kept == wanted),
        Claim("largest mean reward of a step without a valid verdict", "0", f"{paid:g}", met=paid == 0),
    ]  # fmt: skip


def main() -> None:
    args = arguments(__doc__, EXAMPLES, results="rl").parse_args()
    from stages.distributed import engine

    began, steps = time.perf_counter(), 2 if args.quick else 4
    scratch = SCRATCH.with_name("rl_judges_quick") if args.quick else SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)
    make_start(scratch / "start", 10 if args.quick else 150)
    engine.start(threads=1)
    found = {}
    for case in CASES:
        found[case.name] = measure(case, scratch / "start", scratch / "run", steps)
        print(f"{case.name}: {found[case.name]['counts']}, {found[case.name]['seconds']:.1f} s", flush=True)
    engine.stop()
    columns = ("judge", "steps", "answers judged", "skipped", "0 without a request", "requests",
               "requests without a verdict", "curve as healthy", "seconds", "what the run logged first")  # fmt: skip
    table = Table(
        f"{steps} steps of {PROMPTS} questions with {GROUP} answers",
        columns,
        [row_of(case, found[case.name], found["healthy"]) for case in CASES],
    )
    notes = [
        "Equal answers to a question are one request. Skipped answers have no advantage and enter no mean. An answer "
        "that is truncated or empty earns 0 without a request. Requests are those that reached the judge, with those "
        "of the held-out questions, which also meet the misbehaving judge after the last step. A judge that lies gives "
        "a score outside the scale, no JSON or nothing, and is asked three times. \"Down for a while\" refuses "
        f"connections for {OUTAGE:g} s; \"gone\" never comes back; a silent judge accepts requests and sends nothing. "
        "The last two have 0.5 s for a request and 0.5 s of patience, the others 5 and 120 s."
    ]
    save(out_of(args), "judges", claims(steps, found), [table], seconds=time.perf_counter() - began, quick=args.quick,
         seeds={"training": SEED, "start model": 0}, notes=notes)  # fmt: skip


if __name__ == "__main__":
    run(main)
