"""Dreaming along a path: chunk after chunk is watched or generated, and each is written into a temporary memory.

Source: SlowFast-VGen (arXiv 2410.23277), section 3.3. The form of a write is a setting: "temporary" is the published
one, "text" and "past" are the alternatives of its ablation, "both" is this project's, and "none" is the model without a
memory.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from keye.dream.diffusion import conditional_errors, draw_noise, sample, unconditional_errors
from keye.dream.model import DreamModel
from keye.dream.scenes import CHUNK, NO_ACTION, opposite
from keye.errors import ArgumentError, CheckpointError, writing
from keye.files import write_atomically
from keye.memory import attach

WRITES: dict[str, str] = {
    "none": "no memory",
    "temporary": "the previous and the new chunk, all frames noised, no condition (as published)",
    "text": "the new chunk, given the clean previous one and the action (the original Temp-LoRA of text)",
    "past": "windows from everything seen so far, all frames noised, no condition",
    "both": "as text, and the same backwards in time with opposite actions, half of the draws each (not published)",
}
"""Form of a write → what it trains on."""


@dataclass(frozen=True)
class FastSettings:
    """How an episode writes its memory and generates."""

    write: str = "temporary"
    """One of `WRITES`."""

    steps: int = 20
    """Adam steps of a write. Not published."""

    draws: int = 8
    """Noises and noise levels of a step. Not published."""

    learning_rate: float = 3e-3
    """Of the memory. Published: 1e-4, for a model of 1.7 billion parameters."""

    rank: int = 32
    """Of the memory, as published."""

    alpha: float = 32.0
    """The memory's product is scaled by alpha / rank. Not published."""

    match: str = r"^blocks\."
    """The layers with a memory: those whose names contain a match. Not published."""

    past: int = CHUNK
    """Clean frames that a new chunk is generated from, at most."""

    sampling_steps: int = 12
    """Model calls of a generated chunk."""

    def __post_init__(self) -> None:
        if self.write not in WRITES:
            raise ArgumentError(f"write {self.write!r} is not one of {', '.join(WRITES)}")
        if min(self.steps, self.draws, self.past, self.sampling_steps) < 1:
            raise ArgumentError("steps, draws, past and sampling_steps of an episode must be at least 1")


class Episode:
    """One walk of the camera.

    Attributes:
        frames: everything so far, float32 [N, 3, S, S] in −1 … 1.
        memory: the temporary LoRA; None where `write` is "none". It is detached by `close`.
    """

    def __init__(self, model: DreamModel, first: Tensor, settings: FastSettings | None = None, seed: int = 0) -> None:
        """first: the frames that the walk begins with, [N, 3, S, S], at least one. seed: of noise and memory."""
        self.model, self.settings = model, settings or FastSettings()
        self.frames, self.edges, self.actions = first, [0, len(first)], [NO_ACTION] * len(first)
        self.numbers = torch.Generator().manual_seed(seed)
        use = self.settings
        self.memory = None
        if use.write != "none":
            self.memory = attach(
                model, use.rank, use.alpha, use.match, learning_rate=use.learning_rate, max_norm=1.0, seed=seed
            )

    def watch(self, frames: Tensor, action: int) -> None:
        """Take a true chunk [N, 3, S, S] as the next one and write it."""
        self._add(frames, action)

    def dream(self, action: int) -> Tensor:
        """Generate the next chunk, write it, and return it: float32 [4, 3, S, S]."""
        past = self.frames[-self.settings.past :]
        given = self.actions[-len(past) :] + [action] * CHUNK
        given = torch.tensor([given], device=past.device)
        new = sample(self.model, past[None], given, CHUNK, self.numbers, self.settings.sampling_steps)[0]
        self._add(new, action)
        return new

    def close(self) -> None:
        """Remove the memory from the model; its weights are as before."""
        if self.memory is not None:
            self.memory.detach()

    def __enter__(self) -> "Episode":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def save(self, folder: str | Path) -> None:
        """Write the walk so far, its memory and its random numbers; `load` continues from there.

        Raises:
            KeyeError: the folder cannot be written.
        """
        from safetensors.torch import save_file

        folder = Path(folder)
        chunk = len(self.edges) - 2  # the files of a save that is interrupted do not replace those of the last one
        with writing(folder, "the episode"):
            folder.mkdir(parents=True, exist_ok=True)
            state = {"frames": self.frames.contiguous().cpu(), "numbers": self.numbers.get_state()}
            save_file(state, folder / f"frames-{chunk}.safetensors")
            if self.memory is not None:
                self.memory.save(folder / f"memory-{chunk}.safetensors")
            about = {"edges": self.edges, "actions": self.actions, "write": self.settings.write}
            write_atomically(folder / "episode.json", json.dumps(about))
            for path in folder.glob("*.safetensors"):
                if not path.stem.endswith(f"-{chunk}"):
                    path.unlink()

    def load(self, folder: str | Path) -> None:
        """Continue the walk that `save` wrote, with the same model and settings.

        Raises:
            CheckpointError: no walk is there, or one with another form of writing.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        try:
            about = json.loads((folder / "episode.json").read_text(encoding="utf-8"))
            chunk = len(about["edges"]) - 2
            state = load_file(folder / f"frames-{chunk}.safetensors")
        except (OSError, ValueError, LookupError, SafetensorError) as error:
            raise CheckpointError(f"{folder} has no walk ({error}); name a folder that a walk was saved to") from error
        if about["write"] != self.settings.write:
            raise CheckpointError(
                f"{folder} has a walk with write {about['write']!r}, not {self.settings.write!r}; give the same or"
                " another folder"
            )
        if self.memory is not None:
            self.memory.load(folder / f"memory-{chunk}.safetensors")
        self.frames, self.edges = state["frames"].to(self.frames), about["edges"]
        self.actions = about["actions"]
        self.numbers.set_state(state["numbers"])

    def _add(self, frames: Tensor, action: int) -> None:
        self.frames = torch.cat([self.frames, frames.to(self.frames)])
        self.actions += [action] * len(frames)
        self.edges.append(len(self.frames))
        if self.memory is not None:
            self.memory.write(self.write_loss, self.settings.steps)

    def write_loss(self) -> Tensor:
        """The loss of one step of a write after the latest chunk, a mean over the draws."""
        draws, use = self.settings.draws, self.settings.write
        start, middle, end = self.edges[-3:]
        start = max(start, middle - (self.model.config.window - (end - middle)))
        if use in ("text", "both"):
            forwards = self._directed(draws if use == "text" else -(-draws // 2), start, middle, end)
            if use == "text" or draws == 1:
                return forwards.mean()
            return torch.cat([forwards, self._directed(draws // 2, end - 1, middle - 1, start - 1)]).mean()
        if use == "past":
            length = min(self.model.config.window, end)
            first = torch.randint(0, end - length + 1, (draws,), generator=self.numbers).tolist()
            window = torch.stack([self.frames[at : at + length] for at in first])
        else:
            window = self.frames[start:end].expand(draws, -1, -1, -1, -1)
        return unconditional_errors(self.model, window, *draw_noise(window, self.numbers)).mean()

    def _directed(self, draws: int, start: int, middle: int, end: int) -> Tensor:
        """Errors of the frames middle … end, given start … middle; backwards in time where end < start; [draws]."""
        step = 1 if start < end else -1
        order = list(range(start, end, step))
        if step < 0:  # the camera comes from the frame after, by the opposite of the action that led there
            actions = [NO_ACTION, *(opposite(self.actions[at + 1]) for at in order[1:])]
        else:
            actions = self.actions[start:end]
        window = self.frames[order].expand(draws, -1, -1, -1, -1)
        before = abs(middle - start)
        given = torch.tensor(actions, device=window.device).expand(draws, -1)
        noise = draw_noise(window[:, before:], self.numbers)
        return conditional_errors(self.model, window[:, :before], window[:, before:], given, *noise)
