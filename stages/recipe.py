"""Recipes: the whole of what a pre-training run is told, as frozen dataclasses, read from TOML and checked.

A recipe has the tables `model`, `processor`, `data` and one table a stage; `--set annealing.steps=20` overrides a key
from the command line.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keye.errors import RecipeError
from stages.data.sources.transforms import checked
from stages.typed_toml import build, read

STAGES = ("vision", "alignment", "multitask", "annealing")
KINDS = ("video", "image", "text")
TRACKERS = ("wandb", "trackio")
FORMATS = ("jsonl", "json", "parquet", "webdataset", "hub")


@dataclass(frozen=True)
class ModelRecipe:
    """What is trained: a preset made anew, or a Keye directory to go on from.

    preset: "tiny", "small" or "keye_8b". path: a Hugging Face directory of a Keye; wins over the preset. tokenizer: a
    directory or hub id; empty = a byte-level BPE of `vocab_size` entries is trained on the world's own text.
    """

    preset: str = "tiny"
    path: str = ""
    tokenizer: str = ""
    vocab_size: int = 2048


@dataclass(frozen=True)
class ProcessorRecipe:
    """Arguments of `SlowFastEncoder` (`encoder`) and of its `image` method (`image`: min_tokens, max_tokens)."""

    encoder: dict[str, Any] = field(default_factory=dict)
    image: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SourceRecipe:
    """One manifest or data set of chats, or the part of it that has these families and this kind.

    path: a file, folder, glob, URL or `hf://owner/name`; `{run}` stands for the run's directory; a relative path is
    looked for beside the recipe, then in the working directory. kind: "video", "image" or "text"; rows of other kinds
    are passed over. weight: share within its kind. stages: the stages that read it; empty = all but `vision`, which
    reads only what names it.

    format: "jsonl", "json", "parquet", "webdataset" or "hub"; empty = as the path's ending says. config, split: of a
    data set of the hub. columns: what the data set's own columns serve as (`stages.data.sources.chat`). streaming: read
    it as it comes in instead of keeping it on disk, shuffled in a buffer of `shuffle` rows a lane. transforms: names in
    `stages.data.sources.transforms`, applied in this order.
    """

    path: str
    kind: str
    families: tuple[str, ...] = ()
    weight: float = 1.0
    stages: tuple[str, ...] = ()
    format: str = ""
    config: str = ""
    split: str = "train"
    columns: dict[str, str] = field(default_factory=dict)
    streaming: bool = False
    shuffle: int = 256
    transforms: tuple[str, ...] = ()


@dataclass(frozen=True)
class WorldRecipe:
    """A SlowFastWorld drawn into `{run}/world` before training.

    counts: training samples a family; heldout: held-out ones. settings: further arguments of `keye.world.generate`.
    """

    counts: dict[str, int]
    heldout: dict[str, int] = field(default_factory=dict)
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataRecipe:
    """Where the samples come from.

    cache_mb: RAM a process may spend on encoded samples, so that they decode once. workers: threads of a process that
    decode and encode; 0 = by the cores that each process of the machine has for itself. max_bad_fraction: a source of
    whose last 1,000 samples more cannot be used ends the run. not_like: manifests of evaluations; samples that show
    one of their pictures are passed over, up to `not_like_bits` bits of 64 of perceptual hash apart. heldout: sources
    that nothing trains on, for the stages' held-out loss; or in their place the share `heldout_fraction` of the rows of
    each source, chosen by row number.
    """

    sources: tuple[SourceRecipe, ...]
    world: WorldRecipe | None = None
    cache_mb: int = 1024
    workers: int = 0
    max_bad_fraction: float = 0.5
    not_like: tuple[str, ...] = ()
    not_like_bits: int = 6
    heldout: tuple[SourceRecipe, ...] = ()
    heldout_fraction: float = 0.0


@dataclass(frozen=True)
class StageRecipe:
    """What every stage is told.

    steps: optimizer steps. context: tokens a pack holds. packs: packs a step, over all ranks. alike: packs of a step
    that are made to cost the same, best as many as data-parallel ranks meet in a round, or more; 0 = a quarter of the
    step. lr, lr_scale (part of the model, "vision", "projector" or "decoder" → factor on its lr), schedule ("cosine"
    to zero or "constant"), warmup (steps), weight_decay, betas, clip (gradient norm). zero: DeepSpeed ZeRO stage. hpz:
    with zero = 3, ranks of a node that keep the weights among them a second time, so that the backward pass gathers
    them within the node (hpZ, arXiv 2306.10209); 1 = none. sequence_parallel: ranks that share one pack. mixture: kind
    → share of the tokens. encoder: overrides of `processor.encoder`. save_every: steps between checkpoints, of which
    the last `keep` stay until the stage is finished and only its model is left, unless `keep_finished`.
    async_checkpoints: copy them to host memory and write them while training goes on. heldout_every: steps between
    measures of the loss on held-out samples (`data.heldout`), always the same ones, as many as `heldout_steps` steps
    take; 0 = never. spike_loss, spike_norm: a step whose loss (gradient norm) is above so many times its running
    median is skipped; 0 = never. Memory (`stages.distributed.activation_memory`): checkpointing: recompute
    activations; offload: keep the inputs of recomputed layers in host memory; mlp_tiles: parts an MLP is computed in;
    compile: `torch.compile` the layers of decoder and tower.
    """

    steps: int
    lr: float
    context: int = 1024
    packs: int = 2
    alike: int = 0
    schedule: str = "cosine"
    warmup: int = 0
    weight_decay: float = 0.0
    betas: tuple[float, ...] = (0.9, 0.95)
    clip: float = 1.0
    zero: int = 2
    lr_scale: dict[str, float] = field(default_factory=dict)
    hpz: int = 1
    sequence_parallel: int = 1
    mixture: dict[str, float] = field(default_factory=dict)
    encoder: dict[str, Any] = field(default_factory=dict)
    checkpointing: bool = False
    offload: bool = False
    mlp_tiles: int = 1
    compile: bool = False
    save_every: int = 200
    keep: int = 2
    keep_finished: bool = False
    async_checkpoints: bool = False
    heldout_every: int = 0
    heldout_steps: int = 1
    spike_loss: float = 0.0
    spike_norm: float = 0.0

    @property
    def limit(self) -> int | None:
        """Tokens of a sample at most; None where there is no limit."""
        return self.context


@dataclass(frozen=True)
class VisionRecipe(StageRecipe):
    """Stage 0 besides: pairs a step over all ranks, and what they are compared by.

    micro_pairs: pairs of a rank that pass through the towers at once; 0 = all of them. Fewer take less memory and leave
    loss and gradients as they are, but the towers run forward twice.

    text_model: a SigLIP's directory, whose text tower, tokenizer, pooling head, temperature and bias are taken. Empty:
    a text tower of text_width, text_layers and text_heads, which reads text_length tokens of Keye's own tokenizer, is
    drawn at random, and so is a pooling head.

    Stage 0 trains at native resolution: `processor.image` alone bounds stills, and the encoder's budget clips. It reads
    neither `context` nor `packs` nor `alike`, which are of the language stages.
    """

    pairs: int = 32
    micro_pairs: int = 0
    text_model: str = ""
    text_width: int = 128
    text_layers: int = 2
    text_heads: int = 4
    text_length: int = 48

    @property
    def limit(self) -> None:
        """No limit: there is no context to fit."""

    def micro_batches(self, ranks: int) -> int:
        """Micro-batches of a step on each of so many ranks.

        Raises:
            RecipeError: pairs that do not divide among ranks and micro-batches.
        """
        own, rest = divmod(self.pairs, ranks)
        if rest:
            raise RecipeError(f"vision: {self.pairs} pairs cannot be shared by {ranks} ranks evenly; give a divisor")
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
    """Stage 3 besides.

    rope_scale: the factor on the RoPE base (report: 1e6 → 8e6). through: context → steps of what lies in between, as
    `through = { 32768 = 2000 }`; each is a phase of its own, `annealing-32768`, see `Recipe.chain`.
    """

    rope_scale: float = 8.0
    through: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A whole pre-training run.

    start: the stage that begins with `model`; those before it are not part of the run. Empty = the first there is. So
    `start = "alignment"` goes on from pretrained parts without stage 0.

    precision: "auto" (bf16 on a GPU, fp32 on a CPU), "fp32" or "bf16". trackers: "wandb" and "trackio", which are told
    every step besides metrics.jsonl and TensorBoard.
    """

    name: str
    data: DataRecipe
    model: ModelRecipe = ModelRecipe()
    processor: ProcessorRecipe = ProcessorRecipe()
    vision: VisionRecipe | None = None
    alignment: StageRecipe | None = None
    multitask: StageRecipe | None = None
    annealing: AnnealingRecipe | None = None
    seed: int = 0
    precision: str = "auto"
    start: str = ""
    trackers: tuple[str, ...] = ()

    @property
    def stages(self) -> list[str]:
        """Names of the stages this recipe has, in order."""
        return [name for name in STAGES if getattr(self, name) is not None]

    @property
    def chain(self) -> dict[str, StageRecipe]:
        """What is trained one after the other from `start` on, each from the last: phase → what it is told.

        A phase is a stage, or one of the contexts that the annealing goes `through`, shortest first.
        """
        chain = {}
        for name in self.stages[self.stages.index(self.start) if self.start else 0 :]:
            told = getattr(self, name)
            chain |= _phases(told) if isinstance(told, AnnealingRecipe) else {name: told}
        return chain


def stage_of(phase: str) -> str:
    """The stage that a phase of a recipe's chain belongs to: "annealing-32768" → "annealing"."""
    return phase.partition("-")[0]


def _phases(told: AnnealingRecipe) -> dict[str, StageRecipe]:
    """The annealing's phases: the RoPE base is raised once, before the first, and the rate falls only in the last.

    A shorter context has as many more packs a step, so that the tokens of a step and with them the learning rate stay;
    it is cut among as many fewer ranks, so that each holds about as many tokens.
    """
    phases: dict[str, StageRecipe] = {}
    for context in sorted(map(int, told.through)):
        divisors = [n for n in range(1, told.sequence_parallel + 1) if told.sequence_parallel % n == 0]
        phases[f"annealing-{context}"] = dataclasses.replace(
            told,
            steps=told.through[str(context)],
            context=context,
            packs=told.packs * told.context // context,
            alike=told.alike * told.context // context,
            sequence_parallel=next(n for n in divisors if n * told.context >= told.sequence_parallel * context),
            schedule="constant",
            rope_scale=1.0 if phases else told.rope_scale,
            through={},
        )
    last = dataclasses.replace(told, through={}, rope_scale=1.0 if phases else told.rope_scale)
    return {**phases, "annealing": last}


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read, override and check a recipe; paths of its sources become absolute.

    Raises:
        RecipeError: no such file, not TOML, an unknown key, a wrong type or an impossible value.
    """
    path = Path(path)
    table = read(path, overrides, "stages/recipes")
    recipe = build(Recipe, table, str(path))
    _check(recipe, str(path))
    located = {
        key: tuple(dataclasses.replace(s, path=_located(s.path, path.parent, s.format)) for s in sources)
        for key, sources in (("sources", recipe.data.sources), ("heldout", recipe.data.heldout))
    }
    others = tuple(_located(other, path.parent) for other in recipe.data.not_like)
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, not_like=others, **located))


def _check(recipe: Recipe, file: str) -> None:
    def need(ok: bool, message: str) -> None:
        if not ok:
            raise RecipeError(f"{file}: {message}")

    need(bool(recipe.data.sources), "data.sources is empty; name at least one manifest")
    need(0 <= recipe.data.not_like_bits < 32, "data.not_like_bits must be in [0, 32), of 64 bits")
    need(bool(recipe.stages), f"no stage; add one of the tables {', '.join(STAGES)}")
    need(recipe.start in ("", *recipe.stages), f"start must be one of {', '.join(recipe.stages)}, or empty")
    need(recipe.precision in ("auto", "fp32", "bf16"), 'precision must be "auto", "fp32" or "bf16"')
    need(set(recipe.trackers) <= set(TRACKERS), f"trackers may name only {', '.join(TRACKERS)}")
    need(recipe.data.workers >= 0, "data.workers must be at least 1, or 0 to go by the cores")
    need(0 < recipe.data.max_bad_fraction <= 1, "data.max_bad_fraction must be above 0 and at most 1")
    data = recipe.data
    need(0 <= data.heldout_fraction < 1, "data.heldout_fraction must be in [0, 1)")
    need(not (data.heldout and data.heldout_fraction), "give data.heldout or data.heldout_fraction, not both")
    need(
        not (data.heldout_fraction and any(source.streaming for source in data.sources)),
        "data.heldout_fraction selects rows by number, and a streaming source has none; name data.heldout instead",
    )
    named = [(f"data.sources[{i}]", source) for i, source in enumerate(data.sources)]
    for key, source in [*named, *((f"data.heldout[{i}]", source) for i, source in enumerate(data.heldout))]:
        need(source.kind in KINDS, f"{key}.kind must be one of {', '.join(KINDS)}")
        need(source.weight > 0, f"{key}.weight must be above 0")
        need(source.format in ("", *FORMATS), f"{key}.format must be one of {', '.join(FORMATS)}")
        need(source.shuffle >= 1, f"{key}.shuffle must be at least 1")
        unfit = checked(source.transforms, source.streaming)
        need(unfit is None, f"{key}.transforms: {unfit}")
        need(set(source.stages) <= set(STAGES), f"{key}.stages may name only {', '.join(STAGES)}")
    for name in recipe.stages:
        stage: StageRecipe = getattr(recipe, name)
        for key in ("steps", "context", "packs", "sequence_parallel", "save_every", "keep", "heldout_steps"):
            need(getattr(stage, key) >= 1, f"{name}.{key} must be at least 1")
        need(stage.heldout_every >= 0, f"{name}.heldout_every must not be below 0")
        need(
            not stage.heldout_every or bool(data.heldout) or data.heldout_fraction > 0,
            f"{name}.heldout_every measures held-out samples, and there are none; give data.heldout or "
            "data.heldout_fraction",
        )
        need(0 <= stage.alike <= stage.packs, f"{name}.alike must be from 0 (a quarter) to {name}.packs")
        need(stage.lr > 0, f"{name}.lr must be above 0")
        parts = ("vision",) if name == "vision" else ("vision", "projector", "decoder")
        need(set(stage.lr_scale) <= set(parts), f"{name}.lr_scale may name only {', '.join(parts)}")
        need(all(factor > 0 for factor in stage.lr_scale.values()), f"{name}.lr_scale: factors must be above 0")
        need(stage.schedule in ("cosine", "constant"), f'{name}.schedule must be "cosine" or "constant"')
        need(stage.mlp_tiles >= 1, f"{name}.mlp_tiles must be at least 1")
        need(
            stage.checkpointing or not stage.offload,
            f"{name}.offload keeps what checkpointing recomputes from; set {name}.checkpointing = true besides",
        )
        for key, plain in (("sequence_parallel", 1), ("mlp_tiles", 1)):
            need(
                not stage.compile or getattr(stage, key) == plain,
                f"{name}.compile = true takes no {key} = {getattr(stage, key)}; set {name}.compile = false or "
                f"{name}.{key} = {plain}",
            )
        need(
            not stage.compile or stage.zero != 3 or stage.checkpointing,
            f"{name}.compile = true with zero = 3 would keep all gathered weights until the backward pass; set "
            f"{name}.checkpointing = true or {name}.compile = false",
        )
        need(stage.zero in (0, 1, 2, 3), f"{name}.zero must be 0, 1, 2 or 3")
        need(stage.hpz >= 1, f"{name}.hpz must be at least 1; 1 keeps no second copy")
        need(
            stage.hpz == 1 or (stage.hpz > 1 and stage.zero == 3),
            f"{name}.hpz = {stage.hpz} keeps a second copy of what ZeRO-3 cuts; set {name}.zero = 3 or hpz = 1",
        )
        for key in ("warmup", "weight_decay", "clip"):
            need(getattr(stage, key) >= 0, f"{name}.{key} must not be below 0")
        for key in ("spike_loss", "spike_norm"):
            need(getattr(stage, key) == 0 or getattr(stage, key) > 1, f"{name}.{key} must be above 1, or 0 for never")
        need(len(stage.betas) == 2, f"{name}.betas must be two numbers")
        need(set(stage.mixture) <= set(KINDS), f"{name}.mixture may name only {', '.join(KINDS)}")
        need(all(share >= 0 for share in stage.mixture.values()), f"{name}.mixture: a share is below 0")
        total = sum(stage.mixture.values())
        need(not stage.mixture or abs(total - 1) < 1e-6, f"{name}.mixture adds up to {total:g}, but must to 1")
    if recipe.vision is not None:
        vision, sizes = recipe.vision, ("pairs", "text_width", "text_layers", "text_heads", "text_length")
        for key in sizes:
            need(getattr(vision, key) >= 1, f"vision.{key} must be at least 1")
        need(vision.micro_pairs >= 0, "vision.micro_pairs must not be below 0")
        need(
            vision.sequence_parallel == 1,
            "vision.sequence_parallel must be 1, because its pairs are no sequence to be cut; remove the key",
        )
    if recipe.annealing is not None:
        need(recipe.annealing.rope_scale > 0, "annealing.rope_scale must be above 0")
        _check_through(recipe.annealing, need)


def _check_through(told: AnnealingRecipe, need: Callable[[bool, str], None]) -> None:
    for text, steps in told.through.items():
        key = f"annealing.through.{text}"
        whole = text.isascii() and text.isdigit() and text[0] != "0"
        need(whole, f"{key} must be a context and its steps, such as 32768 = 100")
        context, tokens = int(text), told.packs * told.context
        need(context < told.context, f"{key} must be a context below annealing.context = {told.context}")
        need(
            tokens % context == 0,
            f"{key} does not divide the {tokens} tokens of a step; take annealing.context halved once or more",
        )
        need(steps >= 1, f"{key} = {steps}, but it must have at least 1 step")


def _located(path: str, base: Path, kind: str = "") -> str:
    if kind == "hub" or path.startswith("{run}") or "://" in path or Path(path).is_absolute():
        return path
    beside = (base / path).exists() or any(base.glob(path))
    return str((base / path if beside else Path(path)).absolute())
