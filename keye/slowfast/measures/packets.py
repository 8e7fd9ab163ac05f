"""A measure that reads the packets of a video file instead of its pixels.

An encoder spends bytes on what it cannot predict from other pictures, so a picture that needs far more bytes than its
neighbours shows something new. Only comparisons between pictures of the same kind are meaningful: a key frame repeats
what is known already, and a picture that is predicted over a larger distance needs more bytes.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch

from keye.slowfast.measures.base import register
from keye.slowfast.measures.change import Change

if TYPE_CHECKING:
    from keye.video.decoding.packet_facts import PacketFacts


@register
class Packets:
    """Compares frames by the bytes of the pictures between them; the score is 1 / (1 + surprise).

    `surprise` gives the logarithm of each picture's bytes over its usual bytes, several times as much if it has as many
    bytes as a key frame, since it then shows another scene. A sampled frame has the largest value of the pictures since
    the sampled frame before. Over several sampled frames the `ORDER`-norm of their values counts, which is near the
    largest one: a cut adds to the score and continuous motion, whose bytes are usual, hardly does.
    The constants were chosen on the tuning clips of scripts/bench/encoder/packets.py.

    The measure reads packets where a stream has them (`read`). Frames without packets are compared by `pixels`.

    Known weaknesses: a cut at a periodic key frame is seen only if the sizes of the two key frames differ. Changes that
    are smaller than noise, camera shake or changes of light need fewer bytes than those.
    """

    name = "packets"
    threshold = 0.4

    HEADER = 32  # bytes of a picture without content; the sizes of static pictures differ by less
    WINDOW = 1.0  # seconds: the usual bytes are those of the pictures this near, before and after
    FEWEST = 5  # pictures that the usual bytes are the median of, where fewer are this near
    NEW = 5.0  # weight of a picture's bytes over those of a key frame: bytes that are rare and many show another scene
    CUT = 10.0  # surprise of a key frame where none was due: above that of nearly all other pictures
    UNSURE = 1.6  # surprise of a key frame that a cut or the first period may have caused: just slow
    ORDER = 8  # of the norm
    # Frames from a B-picture to the picture before it, and the share of such pictures, from which a stream consists of
    # pyramids: 0.19 in pyramids of 16 frames (SVT-AV1), 0.04 to 0.18 in those of libaom, none in the tuning clips.
    DEEP, PYRAMIDS = 4, 0.03
    # Share of pictures with RARE times their usual bytes from which these follow the structure of the stream (layers of
    # low-delay AV1, 0.27 of a still picture) and not changes: more than in any tuning clip (0.21).
    RARE, COMMON = 2.5, 0.22

    def __init__(self) -> None:
        self.pixels = Change()
        self._latest: tuple[PacketFacts | None, np.ndarray] = (None, np.empty(0))  # of `_excess`

    def prepare(self, frames: torch.Tensor) -> torch.Tensor:
        """Features of frames without packets, see `pixels`."""
        return self.pixels.prepare(frames)

    def compare(self, reference: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        if features.ndim > 2:
            return self.pixels.compare(reference, features)
        return (1 / (1 + (features - reference).abs()[:, 0].pow(1 / self.ORDER))).float()

    def lacks(self, facts: "PacketFacts") -> str | None:
        """Why the packets say nothing about changes; None where they do."""
        if len(facts.keys) > 1 and facts.keys.all():
            return "all packets are key frames"
        inter = facts.coded[~facts.keys]
        if len(inter) > self.FEWEST and np.ptp(inter) <= self.HEADER and inter.min() > self.HEADER:
            return "all packets have one size"
        if np.mean(facts.between & (facts.spans >= self.DEEP)) > self.PYRAMIDS:
            return "pyramids of pictures hide when a change happens"
        unusual = self._excess(facts)[~facts.keys] > np.log(self.RARE)
        if unusual.sum() > self.COMMON * len(unusual):
            return "unusual sizes recur"
        return None

    def read(self, facts: "PacketFacts", frames: np.ndarray) -> torch.Tensor:
        """Features float64 [T, 1] of the frames at ascending positions int64 [T] of a stream."""
        largest = np.maximum.reduceat(self.surprise(facts)[: frames[-1] + 1], np.append(0, frames[:-1] + 1))
        largest[0] = 0.0  # nothing comes before the first frame
        return torch.from_numpy(np.cumsum(largest**self.ORDER))[:, None]

    def surprise(self, facts: "PacketFacts") -> np.ndarray:
        """The surprise of each frame, float64 [F], 0 or more: 0.7 for twice the usual bytes, 4.2 in a new picture."""
        keys = np.flatnonzero(facts.keys)
        coded = facts.coded + float(self.HEADER)
        surprise = self._excess(facts)
        if len(keys):
            after = np.searchsorted(keys, np.arange(len(coded)), side="right")
            around = [coded[keys[places.clip(0, len(keys) - 1)]] for places in (after - 1, after)]
            surprise = surprise * (1 + self.NEW * (coded / np.minimum(*around)).clip(max=1))
            surprise[keys[0]] = 0.0
            surprise[keys[1:]] = self._key_frames(keys, coded[keys])
        return surprise

    def _excess(self, facts: "PacketFacts") -> np.ndarray:
        """ln(bytes / usual bytes) of each frame, float64 [F], 0 or more; 0 for key frames."""
        if self._latest[0] is facts:
            return self._latest[1]
        spans = np.log2(np.maximum(facts.spans, 1)).round()
        kinds = np.where(facts.keys, -1, 2 * spans + facts.between)
        excess = np.zeros(len(kinds))
        for kind in np.unique(kinds[~facts.keys]):
            here = np.flatnonzero(kinds == kind)
            coded = facts.coded[here] + float(self.HEADER)
            excess[here] = np.log(coded / self._usual(coded, facts.times[here])).clip(min=0)
        self._latest = facts, excess
        return excess

    def _usual(self, coded: np.ndarray, times: np.ndarray) -> np.ndarray:
        """The median of the values within `WINDOW`, or of the `FEWEST` nearest ones."""
        numbers = np.arange(len(coded))
        first = np.minimum(np.searchsorted(times, times - self.WINDOW), numbers - self.FEWEST // 2).clip(min=0)
        last = np.searchsorted(times, times + self.WINDOW, side="right")
        last = np.maximum(last, numbers + self.FEWEST // 2 + 1).clip(max=len(coded))
        return np.array([np.median(coded[one:other]) for one, other in zip(first, last, strict=True)])

    def _key_frames(self, keys: np.ndarray, coded: np.ndarray) -> np.ndarray:
        """The surprise of the key frames at positions `keys`, without the first; coded: bytes of each.

        Encoders insert a key frame at a cut, and otherwise at a fixed distance: the largest one, if it recurs. At that
        distance from another one, a key frame says only by its bytes whether it shows another picture. Where the
        largest distance does not recur, as in clips of a few seconds, either may have caused it.
        """
        changes = np.abs(np.diff(np.log(coded))).clip(max=self.CUT)
        distances = np.diff(keys)
        largest = distances.max(initial=0)
        if np.count_nonzero(distances == largest) < 2:
            return np.where(distances == largest, changes.clip(min=self.UNSURE), self.CUT)
        return np.where(np.isin(keys[1:] - largest, keys), changes, self.CUT)
