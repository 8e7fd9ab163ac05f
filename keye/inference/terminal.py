"""`keye chat`: `keye.inference.chat` in a terminal, or one question and its answer in a script."""

import argparse
import contextlib
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from keye.errors import KeyeError
from keye.inference.answering import Figures, Piece, Sampling
from keye.inference.chat import Chat, load_model
from keye.slowfast.plan import VideoPlan
from keye.video.fetch import UrlRules, scheme_of
from keye.video.images import IMAGE_SUFFIXES
from keye.visualize.tables import print_facts, print_table, seconds

HELP = (
    ("/video PATH", "add a clip to the next question"),
    ("/image PATH", "add an image to the next question"),
    ("/plan", "the frames that the model sees: slow and fast, sizes, tokens"),
    ("/think", "ask for a thought before each answer"),
    ("/no_think", "ask for no thought"),
    ("/auto", "let the model decide whether to think"),
    ("/reset", "clear the conversation, clips and images"),
    ("/help", "this list"),
    ("/quit", "leave; so does Ctrl-D. Ctrl-C stops an answer"),
)
PROGRESS_DELAY = 5.0  # seconds before the remaining time is shown


def chat(arguments: argparse.Namespace) -> int:
    """Run `keye chat`; returns the exit code."""
    quiet()
    sampling = Sampling(arguments.max_new_tokens, arguments.temperature)
    with busy(f"loading {arguments.model}"):
        model, processor = load_model(
            arguments.model, arguments.device, arguments.dtype, UrlRules() if arguments.url else None
        )
    conversation = Chat(model, processor, system=arguments.system, thinking=arguments.thinking, sampling=sampling)
    screen = Screen(conversation, sys.stdout)
    for path in arguments.media:
        screen.show(path, quiet=bool(arguments.ask))
    if arguments.ask:
        for question in arguments.ask:
            screen.ask_as_json(question) if arguments.json else screen.ask(question)
        return 0
    return screen.converse()


def quiet() -> None:
    """Turn off the progress bars and hints of transformers."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


class Screen:
    """A `Chat` in a terminal: reads lines, writes answers to `out`."""

    def __init__(self, chat: Chat, out: TextIO) -> None:
        self.chat, self.out = chat, out
        self.styled = out.isatty()

    def converse(self) -> int:
        """Questions and commands until the end of the input."""
        interactive = sys.stdin.isatty()
        if interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  arrow keys and history for input()
            self._dim("Ask about the clip. /help lists the commands, /quit leaves.")
        while True:
            try:
                line = input("› " if interactive else "")
            except EOFError:
                return 0
            except KeyboardInterrupt:
                self._dim("\n/quit leaves")
                continue
            try:
                if not self.execute(line.strip()):
                    return 0
            except KeyeError as error:
                self._note(str(error).replace("urls=UrlRules()", "--url"))
            except KeyboardInterrupt:
                self._dim("\nstopped")

    def execute(self, line: str) -> bool:
        """One line: a command or a question. Returns whether to continue."""
        command, _, rest = line.partition(" ")
        modes = {"/think": True, "/no_think": False, "/auto": None}
        if command in ("/quit", "/exit"):
            return False
        if command in ("/video", "/image"):
            if not rest.strip():
                raise KeyeError(f"{command} needs a path; write {command} PATH")
            self.show(_path(rest), image=command == "/image")
        elif command in modes and not rest:
            self.chat.thinking = modes[command]
            self._dim(
                {True: "thinks before each answer", False: "does not think", None: "the model decides"}[modes[command]]
            )
        elif command == "/plan":
            self.plans()
        elif command == "/reset":
            self.chat.reset()
            self._dim("cleared")
        elif command == "/help":
            for name, what in HELP:
                self._dim(f"{name:<13}{what}")
        elif command.startswith("/") and not rest and not Path(command).exists():
            raise KeyeError(f"{command} is not a command; /help lists them")
        elif line:
            self.ask(line)
        return True

    def show(self, path: str, image: bool | None = None, quiet: bool = False) -> None:
        """Add a clip or an image; without `image`, the suffix of the name decides."""
        name = path if scheme_of(path) not in (None, "file") else Path(path).name
        if image is None:
            image = Path(path).suffix.lower() in IMAGE_SUFFIXES
        if image:
            self.chat.add_image(path)
            if not quiet:
                self._dim(f"{name}: an image")
            return
        with busy(f"reading {name}") as progress:
            plan = self.chat.add_video(path, progress)
        if not quiet:
            self._dim(f"{name}: {_brief(plan)}")
        for warning in plan.warnings:
            self._note(warning)

    def ask(self, question: str) -> None:
        """Ask, and write the answer while it is generated: thoughts dimmed, then a line with its statistics."""
        pieces = self.chat.ask(question)
        mode = None
        with contextlib.closing(pieces):
            with busy("reading the question"):
                first = next(pieces, None)
            try:
                for piece in _from(first, pieces):
                    if piece.thinking != mode:
                        self._begin(piece.thinking, first=mode is None)
                        mode = piece.thinking
                    self.out.write(printable(piece.text))
                    self.out.flush()
            finally:
                self.out.write(f"{self._style(0)}\n")
                self.out.flush()
        self._dim(_statistics(self.chat.figures), sys.stderr if not self.styled else self.out)

    def ask_as_json(self, question: str) -> None:
        """Ask, and write one line of JSON: question, thinking, answer, figures, plans."""
        with busy("answering"):
            texts = {True: "", False: ""}
            for piece in self.chat.ask(question):
                texts[piece.thinking] += piece.text
        figures = self.chat.figures
        line: dict[str, Any] = {"question": question, "thinking": texts[True] or None, "answer": texts[False]}
        line["figures"] = {name: _rounded(value) for name, value in vars(figures).items()}
        line["videos"] = [{"source": p.source, "frames": len(p), "tokens": p.tokens} for p in self.chat.plans]
        print(json.dumps(line, ensure_ascii=False), file=self.out, flush=True)

    def plans(self) -> None:
        """The facts and the frames of every clip's plan."""
        if not self.chat.plans:
            raise KeyeError("there is no clip; /video PATH adds one")
        for plan in self.chat.plans:
            print_facts(plan.facts())
            print_table(("time", "frame", "type", "similarity", "size", "tokens"), plan.frame_rows(), left=(2,))

    def _begin(self, thinking: bool, first: bool) -> None:
        self.out.write(self._style(0) + ("" if first else "\n\n") + self._style(2 if thinking else 0))

    def _style(self, code: int) -> str:
        return f"\x1b[{code}m" if self.styled else ""

    def _dim(self, text: str, out: TextIO | None = None) -> None:
        print(f"{self._style(2)}{printable(text)}{self._style(0)}", file=out or self.out, flush=True)

    def _note(self, text: str) -> None:
        print(printable(text), file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """The text without control characters, which could move the cursor or overwrite the screen."""
    return "".join(c for c in text if c in "\n\t" or c.isprintable() or c in "\u200d\ufe0f")


def _from(first: Piece | None, rest: Iterator[Piece]) -> Iterator[Piece]:
    if first is not None:
        yield first
        yield from rest


def _path(text: str) -> str:
    """A typed or pasted path: with or without quotes, ~ for home; spaces need no quotes."""
    text = text.strip()
    with contextlib.suppress(ValueError):
        words = shlex.split(text)
        text = words[0] if len(words) == 1 else text
    return text if scheme_of(text) else str(Path(text).expanduser())


def _brief(plan: VideoPlan) -> str:
    slow, fast = plan.counts
    return f"{seconds(plan.duration)}, {slow} slow and {fast} fast frames, {plan.tokens:,} tokens (/plan shows them)"


def _statistics(figures: Figures) -> str:
    cached = f" ({figures.cached_tokens:,} cached)" if figures.cached_tokens else ""
    text = f"{figures.prompt_tokens:,} tokens read{cached} in {figures.prefill_seconds:.1f} s"
    text += f", {figures.new_tokens} written"
    if figures.new_tokens > 1:
        text += f", {figures.tokens_per_second:.1f} tokens/s"
    ends = {"length": "; stopped at --max-new-tokens or the end of the context", "interrupted": "; interrupted"}
    return text + ends.get(figures.finish, "")


def _rounded(value: object) -> object:
    return round(value, 4) if isinstance(value, float) else value


@contextlib.contextmanager
def busy(what: str) -> Iterator[Callable[[float], None]]:
    """Report a running task on stderr; yields a function to call with the fraction done.

    After five seconds the remaining time is shown as well: in a terminal whenever it changes, in a log every ten
    seconds.
    """
    began = time.monotonic()

    def left(fraction: float) -> str | None:
        passed = time.monotonic() - began
        if passed <= PROGRESS_DELAY or not fraction:
            return None
        return f"{what}: {fraction:.0%}, {passed / fraction * (1 - fraction):.0f} s left"

    if not sys.stderr.isatty():
        logged = began + PROGRESS_DELAY - 10

        def log(fraction: float) -> None:
            nonlocal logged
            if time.monotonic() - logged > 10 and fraction < 1 and (text := left(fraction)):
                logged = time.monotonic()
                print(text, file=sys.stderr, flush=True)

        yield log
        return
    from rich.console import Console

    with Console(stderr=True).status(printable(what)) as status:
        yield lambda fraction: status.update(left(fraction) or what)
