"""Groups of prompt tokens that a trace knocks out together: frames, slow, fast, timestamps, question, words."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from keye.aggregation.plans import reading_order
from keye.processor.stream import (
    FAST,
    FAST_END,
    FAST_START,
    FRAME,
    IM_END,
    IM_START,
    IMAGE_PAD,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
)  # fmt: skip

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from keye.processor.processor import KeyeProcessor
    from keye.processor.sample import Sample

Kind = Literal["frame", "image", "visual", "slow", "fast", "timestamps", "question", "template", "word", "context"]


@dataclass(frozen=True)
class TokenGroup:
    """Some tokens of a prompt.

    Attributes:
        name: in tables.
        kind: what the tokens are.
        places: their positions in the prompt, ascending.
        frame: number of the frame over all videos of the prompt, of the kind "frame".
        seconds: the frame's time.
        fast: whether the frame is fast.
    """

    name: str
    kind: Kind
    places: tuple[int, ...]
    frame: int | None = None
    seconds: float | None = None
    fast: bool | None = None

    def __len__(self) -> int:
        return len(self.places)


def groups_of(processor: "KeyeProcessor", sample: "Sample") -> list[TokenGroup]:
    """The groups of a prompt of a Keye model.

    Each frame and image (its visual tokens only), then "slow", "fast" and "visual" (all visual tokens), "timestamps"
    (the tokens around frames: `<|frame|>`, seconds, `<|fast_start|>`, `<|fast_end|>`), "question" (text of all turns),
    "template" (turn marks and roles), and each word of the question. Frames, images, timestamps, question and template
    together contain every token once. Groups without tokens are left out.
    """
    ids = sample.input_ids.tolist()
    special = {name: processor.token_id(name) for name in (
        FRAME, FAST_START, FAST_END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD, IM_START, IM_END)}  # fmt: skip
    frames, images, times = _visual(ids, special, sample)
    question, template = _text(processor.tokenizer, ids, special)
    slow = [place for group in frames if not group.fast for place in group.places]
    fast = [place for group in frames if group.fast for place in group.places]
    visual = sorted(place for group in (*frames, *images) for place in group.places)
    wholes = [
        TokenGroup("all slow frames", "slow", tuple(slow)),
        TokenGroup("all fast frames", "fast", tuple(fast)),
        TokenGroup("all visual tokens", "visual", tuple(visual)),
        TokenGroup("timestamps", "timestamps", tuple(times)),
        TokenGroup("question", "question", tuple(question)),
        TokenGroup("template", "template", tuple(template)),
    ]
    words = words_of(processor.tokenizer, ids, question)
    return [group for group in (*frames, *images, *wholes, *words) if group.places]


def words_of(
    tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int], places: Iterable[int] | None = None
) -> list[TokenGroup]:
    """The words at `places` (default: everywhere): neighbouring tokens up to the next one that begins with a space."""
    found: list[tuple[list[int], str]] = []
    for place in range(len(ids)) if places is None else places:
        piece = tokenizer.decode([ids[place]])
        begins = not found or not piece or piece[0].isspace() or found[-1][0][-1] != place - 1
        joins = not begins and (found[-1][1].isspace() or (piece[0].isalnum() and found[-1][1][-1:].isalnum()))
        if not joins:
            found.append(([place], piece))
        else:
            found[-1][0].append(place)
            found[-1] = (found[-1][0], found[-1][1] + piece)
    return [TokenGroup(text.strip() or repr(text), "word", tuple(at)) for at, text in found]


def of_kind(groups: Iterable[TokenGroup], *kinds: Kind) -> list[TokenGroup]:
    """The groups of these kinds, in their order."""
    return [group for group in groups if group.kind in kinds]


def _visual(
    ids: list[int], special: dict[str, int], sample: "Sample"
) -> tuple[list[TokenGroup], list[TokenGroup], list[int]]:
    entries = [(plan, entry) for plan in sample.plans for entry in reading_order(plan)]
    kinds = [int(plan.frame_types[entry]) for plan, entry in entries]
    clock = [float(plan.timestamps[entry]) for plan, entry in entries]
    stills = [] if sample.image_grid_thw is None else (sample.image_grid_thw.prod(1) // 4).tolist()
    marks = {special[FAST_START], special[FAST_END]}
    pads: list[list[int]] = []
    images: list[list[int]] = []
    times: list[int] = []
    inside = in_time = False  # a vision block; the seconds of a frame
    left = 0  # pads of the present image that are still to come
    for place, token in enumerate(ids):
        if token in (special[VISION_START], special[VISION_END]):
            inside = token == special[VISION_START]
            in_time = False
        elif token == special[FRAME]:
            pads.append([])
            times.append(place)
            in_time = True
        elif token == special[VIDEO_PAD]:
            pads[-1].append(place)
            in_time = False
        elif token == special[IMAGE_PAD]:
            if not left:
                left = stills[len(images)]
                images.append([])
            images[-1].append(place)
            left -= 1
        elif inside and (in_time or token in marks):
            times.append(place)
    frames = [
        TokenGroup(f"frame {n + 1}", "frame", tuple(at), n, round(clock[n], 3), kinds[n] == FAST)
        for n, at in enumerate(pads)
    ]
    return frames, [TokenGroup(f"image {n + 1}", "image", tuple(at)) for n, at in enumerate(images)], times


def _text(tokenizer: "PreTrainedTokenizerBase", ids: list[int], special: dict[str, int]) -> tuple[list[int], list[int]]:
    """Positions of the turns' words, and of their marks and roles (with `<|vision_start|>` and `<|vision_end|>`)."""
    question, template = [], []
    shown = role = False  # a vision block; the role up to its line break
    in_turn = False
    for place, token in enumerate(ids):
        if token in (special[VISION_START], special[VISION_END]):
            shown = token == special[VISION_START]
            template.append(place)
        elif shown:
            continue
        elif token in (special[IM_START], special[IM_END]):
            role = in_turn = token == special[IM_START]
            template.append(place)
        elif role or not in_turn:
            template.append(place)
            role = role and "\n" not in tokenizer.decode([token])
        else:
            question.append(place)
    return question, template
