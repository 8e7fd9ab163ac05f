"""How the tensors of a source fit a model."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from keye.checkpoint.shards import Tensors
from keye.errors import CheckpointError


@dataclass
class Report:
    """How the tensors of a source fit a model; as text it has one line for each kind of difference.

    missing: only in the model. unexpected: only in the source. mismatched: (name, shape in the source, shape in the
    model). left_out: known and not needed, by reason. made: tensors without a source that were initialised at random or
    extended, by reason. notes: further messages. loaded: number of tensors that fit.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    made: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    loaded: int = 0

    @property
    def clean(self) -> bool:
        """Whether nothing is missing, unexpected or of another shape."""
        return not (self.missing or self.unexpected or self.mismatched)

    def compare(self, tensors: Tensors, expected: Mapping[str, tuple[int, ...]]) -> "Report":
        """Record the differences between tensors and the names and shapes of a model."""
        self.missing = [name for name in expected if name not in tensors]
        self.unexpected = [name for name in tensors if name not in expected]
        both = [name for name in expected if name in tensors]
        self.mismatched = [
            (name, tuple(tensors[name].shape), tuple(expected[name]))
            for name in both
            if tuple(tensors[name].shape) != tuple(expected[name])
        ]
        self.loaded = len(both) - len(self.mismatched)
        return self

    def refuse(self, where: object, allow_missing: bool = False) -> None:
        """Raise CheckpointError unless all tensors fit; `allow_missing` accepts missing ones."""
        if self.mismatched:
            name, there, here = self.mismatched[0]
            raise CheckpointError(
                f"{where}: {name} has shape {list(there)}, the model's is {list(here)} ({len(self.mismatched)} such); "
                "config.json and the weights belong to different models"
            )
        if self.missing and not allow_missing:
            raise CheckpointError(
                f"{where}: {len(self.missing)} weights are missing ({', '.join(folded(self.missing)[:3])}); "
                "complete the directory or allow missing weights"
            )

    def __str__(self) -> str:
        lines = [f"{self.loaded} tensors fit"]
        for reason, names in self.made.items():
            lines.append(f"{len(names)} created, {reason}: {', '.join(folded(names)[:4])}")
        for reason, names in self.left_out.items():
            lines.append(f"{len(names)} left out, {reason}: {', '.join(folded(names)[:4])}")
        for title, names in (("missing", self.missing), ("unexpected", self.unexpected)):
            if names:
                lines.append(f"{len(names)} {title}: {', '.join(folded(names))}")
        for name, there, here in self.mismatched:
            lines.append(f"another shape: {name} is {list(there)}, the model's is {list(here)}")
        return "\n".join(lines + self.notes)


def folded(names: list[str]) -> list[str]:
    """Names of numbered layers as one: `layers.{0..26}.mlp.fc1.weight`."""
    groups: dict[str, list[int]] = {}
    for name in names:
        number = re.search(r"\.(\d+)\.", name)
        key = name if number is None else f"{name[: number.start(1)]}#{name[number.end(1) :]}"
        groups.setdefault(key, []).append(-1 if number is None else int(number[1]))
    return [key if numbers == [-1] else key.replace("#", _span(sorted(numbers)), 1) for key, numbers in groups.items()]


def _span(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    consecutive = numbers == list(range(numbers[0], numbers[-1] + 1))
    return f"{{{numbers[0]}..{numbers[-1]}}}" if consecutive else f"{{{','.join(map(str, numbers))}}}"
