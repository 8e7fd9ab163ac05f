"""Recipes: the tables model, processor, data and stages of a pre-training run as dataclasses, read from TOML."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypedDict

from keye.encoder_config import EncoderConfig
from keye.errors import RecipeError
from stages import typed_toml
from stages.data.recipe import DataRecipe, SourceRecipe, WorldRecipe, located
from stages.optimizer import OptimizerConfig
from stages.recipe_checks import STAGES, check

__all__ = [
    "STAGES", "AnnealingRecipe", "DataRecipe", "EncoderSettings", "ImageLimits", "ModelRecipe", "ProcessorRecipe",
    "Recipe", "SourceRecipe", "StageRecipe", "VisionRecipe", "WorldRecipe", "load", "located", "stage_of",
]  # fmt: skip
EncoderSettings = Annotated[dict[str, Any], EncoderConfig]


class ImageLimits(TypedDict, total=False):
    min_tokens: int
    max_tokens: int


class VisionSettings(TypedDict, total=False):
    mixer: str
    motion: dict[str, Any]


@dataclass(frozen=True)
class ModelRecipe:
    """The model that is trained: a preset with random weights, or a Keye directory."""

    preset: str = "tiny"
    """Preset: "tiny", "small" or "keye_8b"."""

    path: str = ""
    """A Hugging Face directory of a Keye; overrides the preset."""

    vision: VisionSettings = field(default_factory=dict)
    """Fields of the preset's vision tower that differ: mixer, "attention" or "hyperzzw"; motion, the settings of a
    motion pathway (`keye.motion.settings.MotionSettings`), which needs an encoder with an aggregation."""

    tokenizer: str = ""
    """A directory or hub id; empty: a byte-level BPE of `vocab_size` entries is trained on the world's text."""

    vocab_size: int = 2048
    """Entries of the tokenizer that is trained."""


@dataclass(frozen=True)
class ProcessorRecipe:
    """The encoding of clips and stills."""

    encoder: EncoderSettings = field(default_factory=dict)
    """Settings of the video encoder: the fields of `keye.encoder_config.EncoderConfig`."""

    image: ImageLimits = field(default_factory=dict)
    """Tokens of a still: min_tokens and max_tokens."""


@dataclass(frozen=True)
class StageRecipe(OptimizerConfig):
    """What every stage has, in addition to its optimizer's settings."""

    steps: int
    """Optimizer steps."""

    context: int = 1024
    """Tokens of a pack."""

    global_batch_size: int = field(default=2, metadata={"former": "packs"})
    """Packs of a step over all ranks."""

    balanced_packs: int = field(default=0, metadata={"former": "alike"})
    """Packs of a step that are planned to cost the same, best as many as ranks or more; 0 = a quarter of the step."""

    zero: int = 2
    """Stage of DeepSpeed ZeRO: 0, 1, 2 or 3."""

    hpz: int = 1
    """With zero = 3: ranks of a node that share a second copy of the weights (hpZ, arXiv 2306.10209); 1 = none."""

    sequence_parallel: int = 1
    """Ranks that share one pack."""

    mixture: dict[str, float] = field(default_factory=dict)
    """Kind → share of the tokens."""

    encoder: EncoderSettings = field(default_factory=dict)
    """Overrides of `processor.encoder`."""

    checkpointing: bool = False
    """Recompute activations in the backward pass; attention is kept."""

    offload: bool = False
    """Keep the inputs of recomputed layers in host memory."""

    mlp_tiles: int = 1
    """Parts in which an MLP is computed."""

    compile: bool = False
    """`torch.compile` the layers of decoder and tower."""

    checkpoint_every: int = field(default=200, metadata={"former": "save_every"})
    """Steps between checkpoints."""

    keep_checkpoints: int = field(default=2, metadata={"former": "keep"})
    """Checkpoints that are kept until the stage is finished."""

    keep_finished: bool = False
    """Keep the checkpoints of a finished stage; otherwise only its model is kept."""

    async_checkpoints: bool = False
    """Copy checkpoints to host memory and write them while training continues."""

    heldout_every: int = 0
    """Steps between measurements of the loss on the same held-out samples (`data.heldout`); 0 = never."""

    heldout_steps: int = 1
    """Steps of one measurement."""

    spike_loss: float = 0.0
    """A step whose loss is above so many times its running median is skipped; 0 = never."""

    spike_norm: float = 0.0
    """The same for the gradient norm."""

    @property
    def limit(self) -> int | None:
        """Tokens of a sample at most; None: no limit."""
        return self.context


@dataclass(frozen=True)
class VisionRecipe(StageRecipe):
    """Stage 0: pairs of a picture or clip and its caption (SigLIP's loss).

    It trains at native resolution: `processor.image` alone limits stills, and the encoder's budget limits clips.
    `context`, `global_batch_size` and `balanced_packs` are not used.
    """

    pairs: int = 32
    """Pairs of a step over all ranks."""

    micro_pairs: int = 0
    """Pairs of a rank in one micro-batch, 0 = all; fewer take less memory, and the towers run forward twice."""

    text_model: str = ""
    """Directory of a SigLIP whose text tower, tokenizer, head, temperature and bias are used; empty: random."""

    text_width: int = 128
    """Width of a random text tower."""

    text_layers: int = 2
    """Its layers."""

    text_heads: int = 4
    """Its attention heads."""

    text_length: int = 48
    """Tokens of Keye's own tokenizer that it reads."""

    @property
    def limit(self) -> None:
        """No limit: pairs do not share a context."""

    def micro_batches(self, ranks: int) -> int:
        """Micro-batches of a step on each of so many ranks.

        Raises:
            RecipeError: pairs that do not divide among ranks and micro-batches.
        """
        own, rest = divmod(self.pairs, ranks)
        if rest:
            raise RecipeError(f"vision.pairs = {self.pairs} cannot be shared by {ranks} ranks evenly; give a multiple")
        if not self.micro_pairs or self.micro_pairs >= own:
            return 1
        if own % self.micro_pairs:
            raise RecipeError(
                f"vision: micro_pairs = {self.micro_pairs} does not divide the {own} pairs of each of {ranks} ranks; "
                "set it to a divisor of them, or to 0 for one batch"
            )
        return own // self.micro_pairs


@dataclass(frozen=True)
class AnnealingRecipe(StageRecipe):
    """Stage 3: a longer context and a larger RoPE base."""

    rope_scale: float = 8.0
    """Factor on the base of RoPE (report: 1e6 → 8e6)."""

    context_schedule: dict[str, int] = field(default_factory=dict, metadata={"former": "through"})
    """Context → steps of the phases before the full context, as in `{ 32768 = 2000 }`; see `Recipe.chain`."""


@dataclass(frozen=True)
class Recipe:
    """A complete pre-training run."""

    name: str
    """Name of the run."""

    data: DataRecipe
    """The samples."""

    model: ModelRecipe = ModelRecipe()
    """The model."""

    processor: ProcessorRecipe = ProcessorRecipe()
    """Clips and stills."""

    vision: VisionRecipe | None = None
    """Stage 0."""

    alignment: StageRecipe | None = None
    """Stage 1."""

    multitask: StageRecipe | None = None
    """Stage 2."""

    annealing: AnnealingRecipe | None = None
    """Stage 3."""

    seed: int = 0
    """Seed of everything that is drawn."""

    precision: str = "auto"
    """Numbers: "auto" (bf16 on a GPU, fp32 on a CPU), "fp32" or "bf16"."""

    start: str = ""
    """The stage that begins with `model`, without the stages before it, such as "alignment"; empty = the first."""

    trackers: tuple[str, ...] = ()
    """Trackers "wandb" and "trackio": they get every step, as metrics.jsonl and TensorBoard do."""

    @property
    def stages(self) -> list[str]:
        """Names of the stages this recipe has, in order."""
        return [name for name in STAGES if getattr(self, name) is not None]

    @property
    def chain(self) -> dict[str, StageRecipe]:
        """Phase → recipe, in order from `start` on; each phase begins with the model of the one before.

        A phase is a stage, or one of the contexts of the annealing's `context_schedule`, shortest first.
        """
        chain = {}
        for name in self.stages[self.stages.index(self.start) if self.start else 0 :]:
            stage = getattr(self, name)
            chain |= _phases(stage) if isinstance(stage, AnnealingRecipe) else {name: stage}
        return chain


def stage_of(phase: str) -> str:
    """The stage that a phase of a recipe's chain belongs to: "annealing-32768" → "annealing"."""
    return phase.partition("-")[0]


def _phases(annealing: AnnealingRecipe) -> dict[str, StageRecipe]:
    """The annealing's phases: the RoPE base is raised once, before the first, and the rate falls only in the last.

    A shorter context has more packs a step, so that the tokens of a step, and with them the learning rate, stay the
    same; each pack is divided among fewer ranks, so that each rank has about as many tokens.
    """
    phases: dict[str, StageRecipe] = {}
    full, ranks = annealing.context, annealing.sequence_parallel
    divisors = [n for n in range(1, ranks + 1) if ranks % n == 0]
    for context in sorted(map(int, annealing.context_schedule)):
        phases[f"annealing-{context}"] = dataclasses.replace(
            annealing,
            steps=annealing.context_schedule[str(context)],
            context=context,
            global_batch_size=annealing.global_batch_size * full // context,
            balanced_packs=annealing.balanced_packs * full // context,
            sequence_parallel=next(n for n in divisors if n * full >= ranks * context),
            schedule="constant",
            rope_scale=1.0 if phases else annealing.rope_scale,
            context_schedule={},
        )
    rope_scale = 1.0 if phases else annealing.rope_scale
    return {**phases, "annealing": dataclasses.replace(annealing, context_schedule={}, rope_scale=rope_scale)}


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read, override and check a recipe; paths of its sources become absolute.

    Raises:
        RecipeError: no such file, not TOML, an unknown key, a wrong type or an impossible value.
    """
    path = Path(path)
    foreign = dict.fromkeys(("sft", "mpo"), "a recipe of post-training; use keye posttrain")
    foreign["gspo"] = "a GSPO recipe; use keye posttrain"
    recipe = typed_toml.load(Recipe, path, overrides, str(Path(__file__).parent / "recipes"), foreign)
    check(recipe, str(path))
    return dataclasses.replace(recipe, data=located(recipe.data, path.parent))
