"""Skips a step whose loss or gradient is not finite or far above its running median: weights and moments stay.

The optimizer itself asks it (`engine.skip_steps_when`), when the loss and the norm of the gradient of all parameters
are known and nothing has changed yet. Its inputs are the same on every rank, so all ranks skip the same steps.
"""

import math
from collections import deque
from statistics import median
from typing import Any

from keye.errors import KeyeError

WINDOW = 64  # steps of the running medians
WARMUP = 8  # steps that are taken before one can be a spike
MAX_SKIPPED = 20  # steps in a row that may be skipped before the run ends with an error


class StepGuard:
    """Decides about one step after the other.

    Args:
        name: of the stage, for messages.
        spike_loss, spike_norm: a loss (a gradient norm) above so many times its running median is a spike; 0 turns
            that off.
    """

    def __init__(self, name: str, spike_loss: float = 0.0, spike_norm: float = 0.0) -> None:
        self.name, self.factors = name, {"loss": spike_loss, "grad_norm": spike_norm}
        self.seen: dict[str, deque[float]] = {key: deque(maxlen=WINDOW) for key in self.factors}
        self.bad = self.spikes = 0
        self.begin()

    def begin(self) -> None:
        """Start a new step."""
        self.not_finite, self.reason, self.loss, self.norm = 0, "", math.nan, math.nan

    def should_skip(self, norm: float) -> bool:
        """Whether the step must change nothing; `loss` and `not_finite` are set before.

        Args:
            norm: of the gradient of all parameters, before clipping.
        """
        self.norm = norm
        if self.not_finite or not math.isfinite(norm):
            return True
        for key, value in (("loss", self.loss), ("grad_norm", norm)):
            usual = median(self.seen[key]) if len(self.seen[key]) >= WARMUP else math.inf
            if self.factors[key] and value > self.factors[key] * usual:
                self.reason = f"{key} {value:.4g} is {value / usual:.1f} times its running median"
                return True
        return False

    @property
    def skipped(self) -> str:
        """Why the step was skipped; "" when it was not."""
        return self.reason or ("not finite" if self.not_finite else "")

    def end(self) -> None:
        """End the step.

        Raises:
            KeyeError: too many steps in a row were skipped.
        """
        # The norm is NaN as well when ZeRO itself skipped the step for a gradient that is not finite.
        self.not_finite = self.not_finite or int(not math.isfinite(self.norm))
        self.bad = self.bad + 1 if self.not_finite else 0
        self.spikes = self.spikes + 1 if self.reason else 0
        if self.bad > MAX_SKIPPED:
            raise KeyeError(f"{self.name}: the loss was not finite {self.bad} times in a row; lower its learning_rate")
        if self.spikes > MAX_SKIPPED:
            raise KeyeError(
                f"{self.name}: {self.spikes} steps in a row were spikes ({self.reason}); lower its learning_rate, "
                "or raise its spike_loss and spike_norm"
            )
        if not self.not_finite and not self.reason:
            self.seen["loss"].append(self.loss)
            self.seen["grad_norm"].append(self.norm)

    def state_dict(self) -> dict[str, Any]:
        seen = {key: list(values) for key, values in self.seen.items()}
        return {"seen": seen, "bad": self.bad, "spikes": self.spikes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.bad, self.spikes = state["bad"], state["spikes"]
        for key, values in state["seen"].items():
            self.seen[key] = deque(values, WINDOW)
