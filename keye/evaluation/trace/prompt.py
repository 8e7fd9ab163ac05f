"""A prompt as a trace reads it: ids, positions, visual features and groups of tokens."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from keye.errors import KeyeError
from keye.evaluation.trace.groups import TokenGroup, groups_of, words_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from keye.model.keye import KeyeForConditionalGeneration
    from keye.processor.processor import KeyeProcessor
    from keye.processor.sample import Sample
    from keye.slowfast.plan import VideoPlan

VISUAL = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "video_blocks")


@dataclass(frozen=True)
class Prompt:
    """A prompt up to its last token, whose state predicts the answer.

    Attributes:
        ids: LongTensor `[L]`.
        positions: LongTensor `[3, L]` of a Keye model, `[1, L]` of a text model.
        features: `[V, hidden]` visual tokens, images first; None without any.
        stills: how many of them belong to images.
        groups: the groups of tokens.
        plans: the plan of each video.
    """

    ids: Tensor
    positions: Tensor
    features: Tensor | None = None
    stills: int = 0
    groups: tuple[TokenGroup, ...] = ()
    plans: tuple["VideoPlan", ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    @torch.no_grad()
    def of_sample(cls, model: "KeyeForConditionalGeneration", processor: "KeyeProcessor", sample: "Sample") -> "Prompt":
        """The prompt of a Keye model; `sample` with `add_generation_prompt`. Its pixels are encoded once, here."""
        batch = processor.collate([sample])
        features = model.model.visual_tokens(**{name: batch[name].to(model.device) for name in VISUAL if name in batch})
        stills = int(batch["image_grid_thw"].prod(1).sum()) // 4 if "image_grid_thw" in batch else 0
        groups = tuple(groups_of(processor, sample))
        ids, positions = sample.input_ids.to(model.device), sample.position_ids.to(model.device)
        return cls(ids, positions, features, stills, groups, tuple(sample.plans))

    @classmethod
    def of_text(cls, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", text: str) -> "Prompt":
        """The prompt of a causal LM of transformers, with a group for each word.

        Raises:
            KeyeError: a text without tokens.
        """
        ids = tokenizer(text, return_tensors="pt")["input_ids"][0].to(model.device)
        if not len(ids):
            raise KeyeError("the prompt has no tokens; give a text")
        positions = torch.arange(len(ids), device=ids.device)[None]
        return cls(ids, positions, groups=tuple(words_of(tokenizer, ids.tolist())))

    def without(self, places: Sequence[int], image_id: int | None, video_id: int | None) -> "Prompt":
        """The prompt without the tokens at `places`; the others keep their positions. It has no groups.

        Args:
            image_id, video_id: ids of the placeholders, whose features are removed too; None for a text model.
        """
        keep = torch.ones(len(self), dtype=torch.bool, device=self.ids.device)
        keep[list(places)] = False
        features, stills = self.features, self.stills
        if features is not None:
            still, frame = keep[self.ids == image_id], keep[self.ids == video_id]
            features, stills = features[torch.cat([still, frame])], int(still.sum())
            features = features if len(features) else None
        return dataclasses.replace(
            self, ids=self.ids[keep], positions=self.positions[:, keep], features=features, stills=stills, groups=()
        )

    def replaced(self, place: int, token: int) -> "Prompt":
        """The prompt with another token at one place of its text."""
        ids = self.ids.clone()
        ids[place] = token
        return dataclasses.replace(self, ids=ids)

    def group(self, name: str) -> TokenGroup:
        """The group of this name.

        Raises:
            KeyeError: the prompt has none; the message lists the names.
        """
        found = next((group for group in self.groups if group.name == name), None)
        if found is None:
            raise KeyeError(f"the prompt has no group {name!r}; it has {', '.join(g.name for g in self.groups)}")
        return found
