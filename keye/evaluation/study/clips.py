"""A drawn clip in memory, encoded under many settings: each picture is drawn, compared and resized once."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from keye.encoder import SlowFastEncoder
from keye.evaluation.ablation import detail
from keye.evaluation.study.settings import Setting
from keye.slowfast.budget import SIDE, fit_size
from keye.slowfast.measures import Measure, get_measure
from keye.slowfast.plan import VideoPlan
from keye.slowfast.resizing import resize
from keye.world.slowfastbench import Film, painter_of

KEPT_BYTES = 400 << 20
"""Drawn pictures that are kept; others are drawn again."""
DETAILED = 2
"""Frames of a plan, evenly spaced, whose detail is measured."""
REFERENCE_TOKENS = 192
"""Original frames of more tokens are compared at this size."""
WITHIN = 0.02
"""Largest accepted difference of tokens."""
TRIES, SLOW_TRIES = 8, 3
"""Budgets that are tried to meet the tokens of another setting; fewer for policies that measure detail."""
FEWER = 6
"""Numbers of frames that are tried where no budget meets the tokens."""


class DrawnClip:
    """The frames of a film and what is shared between settings.

    Args:
        real: folder of the real clips.
    """

    def __init__(self, name: str, film: Film, real: Path | None = None) -> None:
        self.name, self.film = name, film
        self._painter = painter_of(film, real)
        self._numbers: list[int] = []  # frame → the first frame with an equal picture
        self._pictures: OrderedDict[int, torch.Tensor] = OrderedDict()
        self._measures: dict[str, _Numbered] = {}
        self._resized: dict[tuple, torch.Tensor] = {}
        self._detail: dict[tuple, tuple[float, float]] = {}
        self._number_frames()

    def _number_frames(self) -> None:
        if self.film.motion != "still":
            self._numbers = list(range(self.film.frames))
            return
        first: dict[tuple, int] = {}
        for frame in range(self.film.frames):
            cell = self.film.cell(frame)
            key = (sum(cell >= cut for cut in self.film.cuts), *self.film.states[:, cell].tolist())
            self._numbers.append(first.setdefault(key, frame))

    def __len__(self) -> int:
        return self.film.frames

    def picture(self, frame: int) -> torch.Tensor:
        """A frame, uint8 [3, H, W]; equal frames of a still film are one tensor."""
        number = self._numbers[frame]
        if number not in self._pictures:
            pixels = np.ascontiguousarray(self._painter.frame(number).transpose(2, 0, 1))
            self._pictures[number] = torch.from_numpy(pixels)
            if len(self._pictures) * pixels.nbytes > KEPT_BYTES:
                self._pictures.popitem(last=False)
        return self._pictures[number]

    def plan(self, setting: Setting, max_tokens: int | None = None) -> VideoPlan:
        """The plan under a setting, with a budget of its own where one is given."""
        encoder = SlowFastEncoder(**setting.settings(max_tokens, self.name))
        rate, full = {"source_fps": self.film.fps}, self._full_size(encoder)
        if encoder.policy.walks:  # measures detail on the pixels
            return setting.plan(_Frames(len(self), self.picture), encoder, full, **rate)
        if encoder.measure.name not in self._measures:
            self._measures[encoder.measure.name] = _Numbered(encoder.measure.name, self.picture)
        numbered = {"measure": self._measures[encoder.measure.name], "threshold": encoder.threshold}
        return setting.plan(_Frames(len(self), self._numbered), encoder.with_settings(**numbered), full, **rate)

    def plan_of_tokens(self, setting: Setting, target: int) -> VideoPlan:
        """The plan under a setting whose tokens are nearest to `target`, by search of its budget.

        Where no size meets the tokens, policies that do not look at the pictures get fewer frames of a larger size. A
        setting that spends less than `target` without a limit stays below it.
        """
        least = setting.resolved()["min_tokens_per_frame"]
        tried: list[VideoPlan] = []
        low, high, budget = 0, 0, max(target, least)
        policy = SlowFastEncoder(**setting.settings()).policy
        for _ in range(SLOW_TRIES if policy.walks else TRIES):
            plan = self.plan(setting, budget)
            tried.append(plan)
            unbound = plan.tokens < (0.9 * target if policy.walks else budget / 4)
            if unbound or abs(plan.tokens / target - 1) <= WITHIN / 2:
                break
            low, high = (budget, high) if plan.tokens < target else (low, budget)
            grown = max(budget + 1, int(budget * min(1.3, target / plan.tokens)))
            budget = max(least, (low + high) // 2 if high else grown)
            if budget in (low, high):
                break
        nearest = min(tried, key=lambda plan: abs(plan.tokens - target))
        above = min((plan for plan in tried if plan.tokens > target), key=lambda plan: plan.tokens, default=None)
        if above is not None and not policy.ranks and abs(nearest.tokens / target - 1) > WITHIN / 2:
            count = len(set(above.frame_indices.tolist()))
            fitting = round(count * target / above.tokens)
            for frames in range(max(1, fitting), max(0, fitting - FEWER), -1):
                part = replace(setting, changes=(*setting.changes, ("max_frames", frames)))
                budget = max(least, target, -(-frames * above.tokens // count))
                tried += [self.plan(part, most) for most in {budget, max(least, target)}]
                if min(abs(plan.tokens / target - 1) for plan in tried) <= WITHIN / 2:
                    break
        return min(tried, key=lambda plan: abs(plan.tokens - target))

    def pictures_of(self, plan: VideoPlan) -> list[torch.Tensor]:
        """The pictures of a plan's entries as a model sees them, uint8 [3, h, w]."""
        return [self._at_size(frame, size)
                for frame, size in zip(plan.frame_indices.tolist(), plan.frame_sizes, strict=True)]  # fmt: skip

    def _at_size(self, frame: int, size: tuple[int, int]) -> torch.Tensor:
        key = (self._numbers[frame], tuple(size))
        if key not in self._resized:
            self._resized[key] = resize(self.picture(frame)[None], key[1], "bicubic")[0]
        return self._resized[key]

    def detail_of(self, plan: VideoPlan) -> tuple[float, float]:
        """(PSNR in dB, SSIM) of at most `DETAILED` evenly spaced entries of a plan."""
        entries = sorted({round(place) for place in np.linspace(0, len(plan) - 1, min(DETAILED, len(plan)))})
        found = []
        for entry in entries:
            frame, size = int(plan.frame_indices[entry]), tuple(plan.frame_sizes[entry])
            key = (self._numbers[frame], size)
            if key not in self._detail:
                self._detail[key] = detail(self._at_size(frame, size), self._original(frame))
            found.append(self._detail[key])
        psnr, ssim = np.mean(found, axis=0).tolist()
        return psnr, ssim

    def _original(self, frame: int) -> torch.Tensor:
        height, width = self.film.size
        if height * width <= REFERENCE_TOKENS * SIDE * SIDE:
            return self.picture(frame)
        return resize(self.picture(frame)[None], fit_size(height, width, 1, REFERENCE_TOKENS), "bicubic")[0]

    def _full_size(self, encoder: SlowFastEncoder) -> tuple[int, int]:
        limits = (encoder.min_tokens_per_frame, encoder.max_tokens_per_frame)
        return fit_size(*self.film.size, *limits, encoder.token_side)

    def _numbered(self, frame: int) -> torch.Tensor:
        """A picture of the clip's size in one colour, which is the frame's number; it takes no memory."""
        number = self._numbers[frame]
        colour = torch.tensor([number >> 16, number >> 8 & 255, number & 255], dtype=torch.uint8)
        return colour.view(3, 1, 1).expand(3, *self.film.size)


class _Frames(Sequence):
    """The frames of a clip as a sequence of pictures that are made when they are read."""

    def __init__(self, count: int, frame: Callable[[int], torch.Tensor]) -> None:
        self._count, self._frame = count, frame

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> torch.Tensor:
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self._frame(index)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return map(self._frame, range(self._count))


class _Numbered:
    """A measure of numbered frames (`DrawnClip._numbered`), which compares equal pairs once over all settings."""

    def __init__(self, name: str, picture: Callable[[int], torch.Tensor]) -> None:
        self._measure: Measure = get_measure(name)
        self.name, self.threshold = self._measure.name, self._measure.threshold
        self._picture = picture
        self._features: dict[int, torch.Tensor] = {}
        self._scores: dict[tuple[int, int], float] = {}

    def prepare(self, frames: torch.Tensor) -> torch.Tensor:
        """Numbers int64 [T] of numbered frames [T, 3, H, W]."""
        red, green, blue = frames[:, :, 0, 0].long().unbind(1)
        return red << 16 | green << 8 | blue

    def compare(self, reference: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """The measure's scores float32 [T] of the pictures with these numbers [T] against that of `reference`."""
        one, others = int(reference), features.tolist()
        new = [other for other in dict.fromkeys(others) if (one, other) not in self._scores]
        if new:
            scores = self._measure.compare(self._feature(one), torch.stack([self._feature(other) for other in new]))
            self._scores |= {(one, other): score for other, score in zip(new, scores.tolist(), strict=True)}
        return torch.tensor([self._scores[one, other] for other in others])

    def _feature(self, number: int) -> torch.Tensor:
        if number not in self._features:
            self._features[number] = self._measure.prepare(self._picture(number)[None])[0].clone()
        return self._features[number]


def events(film: Film) -> list[tuple[float, float]]:
    """Seconds [start, end) of each event.

    An event is a lamp that is lit, a card that is shown, or a dial or disc that stays at a place. The time before the
    first and after the last motion of a dial or disc is no event.
    """
    found = []
    for states in film.states:
        starts = [0, *(np.flatnonzero(np.diff(states)) + 1).tolist()]
        runs = list(zip(starts, [*starts[1:], film.cells], strict=True))
        if film.changes in ("dial", "disc"):
            runs = runs[1:-1] if len(runs) > 2 else runs[1:]
        else:
            runs = [run for run in runs if states[run[0]]]
        found += [(start / 2, end / 2) for start, end in runs]
    return found


def events_seen(film: Film, plan: VideoPlan) -> tuple[float, float]:
    """(share of the events of which a frame is shown, mean tokens of the largest frame that is shown of an event)."""
    times, tokens = plan.timestamps.double().numpy(), plan.tokens_per_frame.numpy()
    largest = [tokens[(times >= start - 1e-3) & (times < end - 1e-3)].max(initial=0) for start, end in events(film)]
    return float(np.mean([count > 0 for count in largest])), float(np.mean(largest))
