"""Video plans and images → the token stream; the special tokens are defined here.

A video's placeholder expands to one group per frame, in time order (vLLM's Keye processor):

    slow   <|frame|>12.5 + n × <|video_pad|>
    fast   <|frame|>13.0<|fast_start|> + n × <|video_pad|> + <|fast_end|>

with the timestamp in seconds to one decimal and n = (height / 28) · (width / 28). The chat template writes
`<|vision_start|>` and `<|vision_end|>` around the groups.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
FRAME, FAST_START, FAST_END = "<|frame|>", "<|fast_start|>", "<|fast_end|>"
CLIP_TIME_START, CLIP_TIME_END = "<|clip_time_start|>", "<|clip_time_end|>"
SPECIAL_TOKENS = (
    END_OF_TEXT, IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD,
    FRAME, FAST_START, FAST_END, CLIP_TIME_START, CLIP_TIME_END,
)  # fmt: skip
# Special tokens that questions and answers may contain: times (report §4) and the places of Qwen's tokenizers. They
# do not structure the stream.
CONTENT_TOKENS = (
    CLIP_TIME_START, CLIP_TIME_END, "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
    "<|quad_start|>", "<|quad_end|>",
)  # fmt: skip

SLOW, FAST = 0, 1
IGNORED = -100

# Line breaks are expressions, because the template's white space is trimmed. `generation` marks the assistant's words
# and the token that ends its turn for training tools; it renders as nothing.
CHAT_TEMPLATE = """
{%- macro words(content) -%}
{%- if content is string -%}{{ content }}{%- else -%}
{%- for part in content -%}
{%- if part.type in ('image', 'image_url') -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type in ('video', 'video_url') -%}<|vision_start|><|video_pad|><|vision_end|>
{%- elif part.type == 'text' -%}{{ part.text }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' -%}
{%- generation -%}{{ words(message.content) + '<|im_end|>' }}{%- endgeneration -%}{{ '\\n' }}
{%- else -%}{{ words(message.content) + '<|im_end|>\\n' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""

Tokenize = Callable[[str], list[int]]


class Stream:
    """Expands placeholders into token ids for one tokenizer.

    Args:
        tokenize: text without special tokens → ids.
        token_id: special token → id.

    Raises:
        KeyError: the tokenizer lacks one of `SPECIAL_TOKENS`.
    """

    def __init__(self, tokenize: Tokenize, token_id: dict[str, int]) -> None:
        self.tokenize = tokenize
        self.id = {token: token_id[token] for token in SPECIAL_TOKENS}
        self._times: dict[str, list[int]] = {}

    def time_tokens(self, seconds: float) -> int:
        """The most tokens of a frame's time, for all times up to `seconds`.

        A character is at most one token; tokens that the tokenizer puts before every text are counted.
        """
        return len(f"{seconds:.1f}") + len(self.tokenize("0")) - 1

    def video(self, frame_types: Sequence[int], tokens: Sequence[int], timestamps: Sequence[float] | None) -> list[int]:
        """Ids of one video's groups; frame_types: 0 slow, 1 fast; tokens: per frame; timestamps: in seconds."""
        ids: list[int] = []
        times = [None] * len(tokens) if timestamps is None else timestamps
        for kind, count, seconds in zip(frame_types, tokens, times, strict=True):
            ids.append(self.id[FRAME])
            if seconds is not None:
                ids += self._time(f"{seconds:.1f}")
            pads = [self.id[VIDEO_PAD]] * count
            ids += [self.id[FAST_START], *pads, self.id[FAST_END]] if kind == FAST else pads
        return ids

    def _time(self, text: str) -> list[int]:
        if text not in self._times:
            self._times[text] = self.tokenize(text)
        return self._times[text]

    def expand(self, ids: Iterable[int], stills: Iterable[int], videos: Iterable[list[int]]) -> list[int]:
        """Replace each `<|image_pad|>` by its image's number of pads and each `<|video_pad|>` by its video's groups.

        Raises:
            ValueError: more or fewer placeholders than stills or videos.
        """
        stills, videos = iter(stills), iter(videos)
        out: list[int] = []
        try:
            for token in ids:
                if token == self.id[IMAGE_PAD]:
                    out += [token] * next(stills)
                elif token == self.id[VIDEO_PAD]:
                    out += next(videos)
                else:
                    out.append(token)
        except StopIteration:
            raise ValueError("the text has more placeholders than there are images or videos") from None
        if next(stills, None) is not None or next(videos, None) is not None:
            raise ValueError("there are more images or videos than placeholders in the text")
        return out

    def labels(self, ids: Tensor, last_turn_only: bool = False) -> Tensor:
        """`[L]` labels: the assistant's words and their `<|im_end|>`, or those of its last turn; −100 elsewhere.

        A turn's words start after `<|im_start|>assistant` and its line break. Its images and videos, from
        `<|vision_start|>` to `<|vision_end|>`, have no labels.
        """
        opening = torch.tensor([self.id[IM_START], *self.tokenize("assistant\n")])
        labels = torch.full_like(ids, IGNORED)
        ends = (ids == self.id[IM_END]).nonzero()[:, 0]
        starts = (ids == self.id[IM_START]).nonzero()[:, 0].tolist()
        for start in reversed(starts):
            first = start + len(opening)
            if torch.equal(ids[start:first], opening):
                last = ends[ends >= first]
                stop = int(last[0]) + 1 if len(last) else len(ids)
                labels[first:stop] = ids[first:stop]
                if last_turn_only:
                    break
        begins, closes = ids == self.id[VISION_START], ids == self.id[VISION_END]
        shown = begins.cumsum(0) - closes.cumsum(0) + closes.long() > 0
        return labels.masked_fill(shown, IGNORED)

    def spoken(
        self, ids: Tensor, bare: Sequence[int], places: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]
    ) -> Tensor:
        """`[L]` labels of the assistant's words as a template marks them; −100 elsewhere and at images and videos.

        Args:
            ids: `[L]`, expanded.
            bare: ids before placeholders were expanded.
            places: first and last character in the text of each id of `bare`.
            spans: first and last-plus-one characters of the assistant's words; a token that overlaps one has a label.
        """
        pads, closing, rest = (self.id[IMAGE_PAD], self.id[VIDEO_PAD]), self.id[VISION_END], ids.tolist()
        flags: list[bool] = []
        for token, (first, last) in zip(bare, places, strict=True):
            if token in pads:  # it expanded to all ids before the next `<|vision_end|>`
                flags += [False] * (rest.index(closing, len(flags)) - len(flags))
            else:
                flags.append(any(first < stop and last >= start for start, stop in spans))
        return ids.masked_fill(~torch.tensor(flags), IGNORED)
