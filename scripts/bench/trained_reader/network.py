"""A small network that reads a plan: a convolution of every picture, then attention over columns of the frame.

The convolution keeps columns, as a tag and its lamp share one. Features of slow and of fast pictures are in grids of
their own, by half second; what a plan does not show is zero. The question attends to the columns.
"""

import torch
from torch import nn
from torch.nn import functional

from scripts.bench.trained_reader.clips import ANSWERS, CELLS, COLUMNS, FAMILIES_ASKED, STATES, TAG_COLOURS, WORDS, Seen

FREE, WIDTH, KINDS = 4, 64, 2
TAGS = len(TAG_COLOURS) + 1


class Stem(nn.Module):
    """Pictures float [N, 4, 48, 80] (RGB and a plane with the kind) to features of columns [N, 48, 20]."""

    def __init__(self) -> None:
        super().__init__()
        steps = ((4, 16, (2, 2)), (16, 32, (2, 2)), (32, 32, (2, 1)))
        layers: list[nn.Module] = []
        for inputs, outputs, stride in steps:
            layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(32, 48, (6, 1)), nn.ReLU())

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return self.layers(pictures)[:, :, 0]


class Reader(nn.Module):
    """Answers questions about clips; see the module."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Stem()
        self.state, self.tag, self.free = (nn.Conv1d(48, size, 1) for size in (STATES, TAGS, FREE))
        profile = KINDS * CELLS * (STATES + FREE + 1)
        self.profile, self.colour = nn.Linear(profile, WIDTH), nn.Linear(TAGS, WIDTH)
        self.match = nn.Linear(1, WIDTH)
        self.columns = nn.Parameter(0.02 * torch.randn(COLUMNS, WIDTH))
        self.families, self.words = nn.Embedding(len(FAMILIES_ASKED), WIDTH), nn.Embedding(len(WORDS), WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 3, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.point, self.answer = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, len(ANSWERS))

    def forward(
        self, seen: Seen, clips: torch.Tensor, questions: torch.Tensor, flip: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the options, and the loss of the labels of what is shown.

        Args:
            seen: of one setting.
            clips: int64 [B].
            questions: about these clips, int64 [Q].
            flip: clips to be mirrored, bool [B].

        Returns:
            (float [Q, 4], -inf where there is no option; float scalar).
        """
        entries = torch.cat([torch.arange(*seen.starts[clip : clip + 2].tolist()) for clip in clips.tolist()])
        owner = torch.repeat_interleave(torch.arange(len(clips)), seen.starts[clips + 1] - seen.starts[clips])
        states, tags, cells, slow = seen.states[clips], seen.tags[clips], seen.cells[entries], seen.slow[entries].long()
        # Equal pictures of one kind are read once.
        keys, which = torch.unique(2 * seen.picture[entries] + slow, return_inverse=True)
        pictures = seen.pictures[keys // 2].float() / 128 - 1
        if flip is not None:
            mirrored = torch.zeros(len(keys), dtype=torch.bool).index_put((which,), flip[owner])
            pictures[mirrored] = pictures[mirrored].flip(-1)
            states[flip], tags[flip] = states[flip].flip(-1), tags[flip].flip(-1)
        kind = (keys % 2).float()[:, None, None, None].expand(-1, 1, *pictures.shape[2:])
        features = self.stem(torch.cat([pictures, kind], 1))[which]
        state, tag = self.state(features), self.tag(features)
        loss = functional.cross_entropy(state, states[owner, cells]) + functional.cross_entropy(tag, tags[owner])
        shown = torch.cat([state.softmax(1), self.free(features), torch.ones_like(state[:, :1])], 1)
        grid = shown.new_zeros(len(clips), KINDS, CELLS, shown.shape[1], COLUMNS)
        grid = grid.index_put((owner, slow, cells), shown)
        counts = torch.bincount(owner, minlength=len(clips))[:, None, None]
        colours = torch.zeros(len(clips), TAGS, COLUMNS).index_add(0, owner, tag) / counts
        colours = colours.softmax(1).transpose(1, 2)
        tokens = self.profile(grid.permute(0, 4, 1, 2, 3).flatten(2)) + self.colour(colours) + self.columns
        return self._answer(seen, clips, questions, tokens, colours), loss

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
        pointed = (weights * colours[:, :, 1:]).sum(1).clamp_min(1e-4).log()
        logits = functional.pad(pointed, (0, len(ANSWERS) - len(TAG_COLOURS))) + self.answer(out[:, 0])
        options = seen.options[questions]
        return logits.gather(1, options.clamp_min(0)).masked_fill(options < 0, -torch.inf)
