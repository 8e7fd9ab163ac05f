"""A small network that reads a plan: a convolution of every picture, then attention over columns of the frame.

The convolution (`Eye`) keeps columns, as a tag and its lamp share one, and says what each column shows. What slow and
fast pictures show is in grids of their own, by half second; what a plan does not show is zero. The question attends to
the columns (`Reader`).
"""

import torch
from torch import nn
from torch.nn import functional

from scripts.bench.trained_reader.clips import ANSWERS, CELLS, COLUMNS, FAMILIES_ASKED, STATES, TAG_COLOURS, WORDS, Seen

WIDTH, KINDS = 64, 2
TAGS = len(TAG_COLOURS) + 1


class Eye(nn.Module):
    """Pictures uint8 [N, 3, 48, 80] to logits of what columns show: states [N, 9, 20] and tags [N, 6, 20]."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, stride in ((3, 16, (2, 2)), (16, 32, (2, 2)), (32, 32, (2, 1))):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(32, 64, (6, 1)), nn.ReLU())
        self.shown = nn.Conv1d(64, STATES + TAGS, 1)

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See the class."""
        state, tag = self.shown(self.layers(pictures.float() / 128 - 1)[:, :, 0]).split((STATES, TAGS), 1)
        return state, tag

    @torch.no_grad()
    def look(self, pictures: torch.Tensor) -> torch.Tensor:
        """Probabilities of states and tags of the columns of pictures uint8 [N, 3, 48, 80]: float32 [N, 15, 20]."""
        return torch.cat([torch.cat([part.softmax(1) for part in self(some)], 1) for some in pictures.split(256)])


class Reader(nn.Module):
    """Answers questions about what the pictures of a plan show; see the module."""

    def __init__(self) -> None:
        super().__init__()
        self.profile, self.colour = nn.Linear(KINDS * CELLS * (STATES + 1), WIDTH), nn.Linear(TAGS, WIDTH)
        self.match = nn.Linear(1, WIDTH)
        self.columns = nn.Parameter(0.02 * torch.randn(COLUMNS, WIDTH))
        self.families, self.words = nn.Embedding(len(FAMILIES_ASKED), WIDTH), nn.Embedding(len(WORDS), WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.point, self.answer = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, len(ANSWERS))

    def forward(
        self,
        seen: Seen,
        shown: torch.Tensor,
        clips: torch.Tensor,
        questions: torch.Tensor,
        flip: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits of the options, float [Q, 4], -inf where there is no option.

        Args:
            seen: of one setting.
            shown: what its pictures show, float [U, 15, 20].
            clips: int64 [B].
            questions: about these clips, int64 [Q].
            flip: clips to be mirrored, bool [B].
        """
        entries = torch.cat([torch.arange(*seen.starts[clip : clip + 2].tolist()) for clip in clips.tolist()])
        owner = torch.repeat_interleave(torch.arange(len(clips)), seen.starts[clips + 1] - seen.starts[clips])
        found = shown[seen.picture[entries]]
        if flip is not None:
            found[flip[owner]] = found[flip[owner]].flip(-1)
        state, tag = found.split((STATES, TAGS), 1)
        grid = found.new_zeros(len(clips), KINDS, CELLS, STATES + 1, COLUMNS)
        where = owner, seen.slow[entries].long(), seen.cells[entries]
        grid = grid.index_put(where, torch.cat([state, torch.ones_like(state[:, :1])], 1))
        counts = torch.bincount(owner, minlength=len(clips))[:, None, None]
        colours = torch.zeros(len(clips), TAGS, COLUMNS).index_add(0, owner, tag).transpose(1, 2) / counts
        tokens = self.profile(grid.permute(0, 4, 1, 2, 3).flatten(2)) + self.colour(colours) + self.columns
        return self._answer(seen, clips, questions, tokens, colours)

    def _answer(
        self, seen: Seen, clips: torch.Tensor, questions: torch.Tensor, tokens: torch.Tensor, colours: torch.Tensor
    ) -> torch.Tensor:
        """Logits [Q, 4] from tokens [B, 20, 64] and shares of colours [B, 20, 6] of columns."""
        place = torch.full((len(seen),), -1).index_put((clips,), torch.arange(len(clips)))[seen.clip[questions]]
        word, colours = seen.word[questions], colours[place]
        named = torch.where(word < TAGS, word, 0)  # words 1 to 5 are colours, in the order of the tags
        match = colours.gather(2, named[:, None, None].expand(-1, COLUMNS, 1)) * (named > 0)[:, None, None]
        asked = self.families(seen.family[questions]) + self.words(word)
        out = self.layers(torch.cat([asked[:, None], tokens[place] + self.match(match) + asked[:, None]], 1))
        weights = (out[:, 1:] @ self.point(out[:, 0])[:, :, None] / WIDTH**0.5).softmax(1)
        pointed = (weights * colours[:, :, 1:]).sum(1).clamp_min(1e-3).log()
        logits = functional.pad(pointed, (0, len(ANSWERS) - len(TAG_COLOURS))) + self.answer(out[:, 0])
        options = seen.options[questions]
        return logits.gather(1, options.clamp_min(0)).masked_fill(options < 0, -torch.inf)
