"""A reward model: the decoder reads a chat with an answer, and a scalar head scores the answer's last token.

It is trained on pairs by the Bradley-Terry model, P(chosen is better) = σ(score(chosen) − score(rejected)), so that
only differences of scores of the same prompt have a meaning. A directory of one has the files of a Hugging Face model,
`reward_head.safetensors` and `reward.json`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from keye.checkpoint.shards import read_json
from keye.errors import CheckpointError
from keye.model.keye import KeyeForConditionalGeneration
from keye.processor.processor import KeyeProcessor
from rl.policy.prefix import PrefixTree
from rl.policy.scoring import Group, continued_positions, vision_inputs
from rl.preference.pairs import encode_answer
from stages.distributed.engine import device, resolve_precision
from stages.distributed.weights import open_start

HEAD, RECORD = "reward_head.safetensors", "reward.json"
PARTS = ("visual", "projector", "language_model")


class RewardModel(nn.Module):
    """Scores of answers.

    Args:
        model: Keye; its language head is not used. The scalar head starts at zero: all answers are equal.
    """

    def __init__(self, model: KeyeForConditionalGeneration) -> None:
        super().__init__()
        self.backbone = model.model
        self.head = nn.Linear(model.config.text_config.hidden_size, 1, bias=False, dtype=torch.float32)
        nn.init.zeros_(self.head.weight)

    @property
    def config(self) -> Any:
        return self.backbone.config

    def forward(self, groups: list[Group]) -> Tensor:
        """Scores float32 of the completions of all groups, one after another; each prompt is read once."""
        where = self.head.weight.device
        lengths = [[len(c) for c in group.completions] for group in groups]
        samples = [group.sample for group in groups]
        tree = PrefixTree([len(sample) for sample in samples], lengths)
        ids = tree.pack([s.input_ids for s in samples], [group.completions for group in groups])
        positions = tree.pack(
            [s.position_ids for s in samples],
            [[continued_positions(g.sample, len(c)) for c in g.completions] for g in groups],
        )
        hidden = self.backbone(
            input_ids=ids[None].to(where),
            position_ids=positions[:, None].to(where),
            cu_seqlens=tree.cu_seqlens().to(where),
            varlen=tree.attention,
            **vision_inputs(samples, where),
        ).last_hidden_state[0]
        last = hidden[last_tokens(tree).to(where)].float()
        return F.linear(last, self.head.weight.float())[:, 0]


def last_tokens(tree: PrefixTree) -> Tensor:
    """int64 [S]: the place in the packed row of the last token of every completion."""
    places, at = [], 0
    for prompt, lengths in zip(tree.prompt_lengths, tree.completion_lengths, strict=True):
        at += prompt
        for length in lengths:
            at += length
            places.append(at - 1)
    return torch.tensor(places)


def pair_loss(scores: Tensor) -> Tensor:
    """Bradley-Terry loss float32 [P] of scores [P, 2] of chosen and rejected answers: −log σ(chosen − rejected)."""
    chosen, rejected = scores.float().unbind(-1)
    return -F.logsigmoid(chosen - rejected)


@dataclass(frozen=True)
class RewardRecord:
    """The content of `reward.json`."""

    start: str
    """The model that training started from."""

    trained: str
    """Part that was trained: "head" or "full"."""

    pairs: int
    """Pairs that it was trained on."""

    heldout_pairs: int
    """Pairs that it was measured on."""

    accuracy: float | None
    """Share of held-out pairs whose chosen answer has the higher score."""

    mean: float
    """Mean score of the training pairs' answers."""

    deviation: float
    """Standard deviation of these scores."""


def write_head(folder: Path, weight: Tensor, record: RewardRecord) -> None:
    """Write the head and its record into the directory of a model."""
    save_file({"weight": weight.detach().float().cpu().contiguous()}, folder / HEAD)
    (folder / RECORD).write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")


class RewardScorer:
    """A trained reward model that scores answers.

    Args:
        directory: as `train_reward_model` writes it. precision: "auto", "fp32" or "bf16".

    Raises:
        CheckpointError: the directory has no reward model, or one that is damaged.
    """

    def __init__(self, directory: str | Path, precision: str = "auto") -> None:
        folder = Path(directory)
        if not (folder / HEAD).is_file() or not (folder / RECORD).is_file():
            raise CheckpointError(f"{folder} has no {HEAD} and {RECORD}; train one with keye posttrain reward")
        self.record = RewardRecord(**read_json(folder / RECORD, "train the reward model again"))
        dtype = torch.bfloat16 if resolve_precision(precision) == "bf16" else torch.float32
        model = open_start(folder).build(dtype, device(), PARTS)
        self.processor = KeyeProcessor.from_pretrained(folder)
        self.model = RewardModel(model)
        try:
            weight = load_file(folder / HEAD)["weight"]
        except (SafetensorError, OSError, KeyError) as error:
            raise CheckpointError(f"{folder / HEAD} cannot be read ({error}); train the reward model again") from error
        if weight.shape != self.model.head.weight.shape:
            raise CheckpointError(f"{folder / HEAD} has the shape {tuple(weight.shape)}, not that of its model")
        self.model.head.weight = nn.Parameter(weight.to(device()))
        self.model.eval().requires_grad_(False)

    @torch.no_grad()
    def scores(self, messages: list[dict[str, Any]], base_dir: str | Path, texts: Sequence[str]) -> list[float]:
        """The score of each text as the answer to a chat; the chat's media are read once.

        Equal texts have equal scores: each is read once. Scores of the same text at two places of a packed row differ
        by rounding errors, which standardised advantages of a group of equal answers would enlarge to ±1.

        Args:
            messages: the chat up to the answer. base_dir: the folder of its relative paths.

        Raises:
            KeyeError: the chat's media cannot be read.
        """
        sample = self.processor.sample(messages, base_dir, add_generation_prompt=True)
        unique = list(dict.fromkeys(texts))
        answers = [encode_answer(self.processor, text) for text in unique]
        group = Group(sample, answers, [], [True] * len(answers), unique)
        scores = dict(zip(unique, self.model([group]).tolist(), strict=True))
        return [scores[text] for text in texts]

    def standard(self, score: float) -> float:
        """A score in standard deviations from the mean of the training answers, as a number from 0 to 1 (logistic)."""
        return float(torch.sigmoid(torch.tensor((score - self.record.mean) / max(self.record.deviation, 1e-6))))
