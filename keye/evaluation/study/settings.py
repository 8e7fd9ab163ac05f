"""What a study compares: contenders by name, each at each budget, and the default with one factor changed."""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from keye.encoder import SlowFastEncoder
from keye.errors import KeyeError
from keye.slowfast.budget import LEAST_FAST, size_tokens
from keye.slowfast.clip_walk import reads_packets
from keye.slowfast.plan import VideoPlan

REFERENCE = "default"
"""The contender whose tokens the others are matched to, clip by clip."""
RIVALS = ("random", "uniform", "downsampled")
"""A win counts only against all of these together."""
CEILING = "all_slow"
"""Every frame at its full size, without a budget."""
SPARSE = "sparse"

_RELEASED = {key: value for key, value in SlowFastEncoder.released().settings.items() if key != "max_tokens"}
CONTENDERS: dict[str, dict[str, Any]] = {
    "default": {},
    "released": _RELEASED,
    "random": {"policy": "random"},
    "uniform": {"policy": "uniform:4"},
    "two_stream": {"policy": "two_stream"},
    "downsampled": {"policy": "all_slow", "min_tokens_per_frame": LEAST_FAST},
    "sparse": {"policy": "all_slow"},
    "all_slow": {"policy": "all_slow"},
}
"""Name → settings of the encoder; any other name is a policy's spec."""
MEANINGS = {
    "default": "the default settings",
    "released": "the settings of the release (`SlowFastEncoder.released`)",
    "random": "one frame in four is slow, drawn with another seed for each clip",
    "uniform": "every fourth frame is slow",
    "two_stream": "10 frames at full size and all frames at 16 tokens (SlowFast-LLaVA)",
    "downsampled": "all frames at one size, of 4 tokens or more",
    "sparse": "as many evenly spaced frames at full size as the budget holds",
    "all_slow": "all frames at full size, without a budget; not at equal tokens",
}
FACTORS = {"threshold": "threshold", "ratio": "fast_ratio", "measure": "measure", "fps": "fps",
           "floor": "min_tokens_per_frame", "multiple": "slow_multiple"}  # fmt: skip
"""Option → setting of the encoder."""
UNLIMITED = 1 << 30


@dataclass(frozen=True)
class Setting:
    """One way to encode.

    Attributes:
        policy: a name in `CONTENDERS`, or a policy's spec.
        budget: tokens of a video; None for no limit.
        changes: settings of the encoder that differ from the contender's.
    """

    policy: str
    budget: int | None
    changes: tuple[tuple[str, Any], ...] = ()

    @property
    def label(self) -> str:
        """The name in predictions and tables, such as "default@2048 fast_ratio=0.1"."""
        changes = "".join(f" {name}={value}" for name, value in self.changes)
        return f"{self.policy}@{self.budget or 'unlimited'}{changes}"

    @property
    def is_reference(self) -> bool:
        """Whether other settings of the same budget are matched to this one's tokens."""
        return self.policy == REFERENCE and not self.changes

    def settings(self, max_tokens: int | None = None, clip: str = "") -> dict[str, Any]:
        """The arguments of the encoder for a clip, with a budget other than the setting's own."""
        base = CONTENDERS.get(self.policy, {"policy": self.policy})
        if base.get("policy") == "random":
            base = {"policy": f"random:seed={zlib.crc32(clip.encode()) % 65_536}"}
        return {**base, **dict(self.changes), "max_tokens": max_tokens or self.budget or UNLIMITED}

    def resolved(self) -> dict[str, Any]:
        """All settings of the encoder as JSON values, to notice a change of a default."""
        return SlowFastEncoder(**self.settings()).settings

    def plan(self, source: Any, encoder: SlowFastEncoder, full_size: tuple[int, int], **sampling: Any) -> VideoPlan:
        """The plan of a clip; `encoder` has these settings with a budget and a measure of its own.

        Args:
            full_size: (height, width) of a frame at full size.
        """
        if self.policy == SPARSE:
            full = size_tokens(full_size, encoder.token_side)
            encoder = encoder.with_settings(max_frames=-(-encoder.max_tokens // full))
        return encoder.plan(source, **sampling)


def settings_of(
    policies: Sequence[str], budgets: Sequence[int], factors: Mapping[str, Sequence[Any]], full: bool = False
) -> list[Setting]:
    """Every policy at every budget, and the reference with one factor changed at the middle budget.

    Args:
        policies: names in `CONTENDERS` or specs. The reference is added if it is not among them.
        budgets: tokens of a video.
        factors: names in `FACTORS` → values.
        full: every combination of policies, budgets and factors instead.

    Raises:
        KeyeError: a name or a value is impossible, or a measure reads files.
    """
    policies = list(dict.fromkeys([REFERENCE, *policies]))
    changes = {FACTORS[name]: list(values) for name, values in factors.items() if values}
    found = [Setting(name, budget) for budget in budgets for name in policies if name != CEILING]
    if CEILING in policies:
        found.append(Setting(CEILING, None))
    if full:
        combined = [tuple(zip(changes, values, strict=True)) for values in product(*changes.values())]
        found += [Setting(name, budget, change) for budget in budgets for name in policies if name != CEILING
                  for change in combined if change]  # fmt: skip
    else:
        middle = sorted(budgets)[len(budgets) // 2]
        found += [Setting(REFERENCE, middle, ((name, value),)) for name, values in changes.items() for value in values]
    found = list(dict.fromkeys(found))
    for setting in found:
        if reads_packets(SlowFastEncoder(**setting.settings()).measure):
            raise KeyeError("the measure packets reads files, and the clips of a study are drawn; leave it out")
    return found


def split_specs(texts: Iterable[str]) -> list[str]:
    """Names and specs separated by spaces or commas; a piece `key=value` belongs to the spec before it."""
    found: list[str] = []
    for text in texts:
        fresh = True
        for piece in text.split(","):
            if not fresh and "=" in piece and ":" not in piece:
                found[-1] += f",{piece}"
            else:
                found.append(piece.strip())
            fresh = False
    return [name for name in found if name]
