"""A Keye directory from pretrained parts: a transformers decoder, a SigLIP, and a randomly initialised projector."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig

from keye.checkpoint import released_layout as names
from keye.checkpoint.report import Report
from keye.checkpoint.shards import (
    MAX_SHARD,
    Computed,
    Progress,
    Stored,
    Tensors,
    atomic_directory,
    in_memory,
    open_checkpoint,
    read_json,
    write_shards,
)
from keye.errors import CheckpointError
from keye.model.config import KeyeConfig, KeyeVisionConfig
from keye.model.keye import KeyeForConditionalGeneration
from keye.model.vision import POSITION_SHARE

NEW_ROW_SPREAD = 0.1  # of the old rows' standard deviation
ROWS_MULTIPLE = 64  # of a larger vocabulary, for fast matrix products
EMBEDDINGS, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"


def initialise(
    text: str | Path,
    vision: str | Path | KeyeVisionConfig | None = None,
    *,
    out: str | Path,
    tokenizer: str | Path | None = None,
    gguf_file: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard: int = MAX_SHARD,
    seed: int = 0,
    progress: Progress | None = None,
) -> Report:
    """Write `out`, a directory that `KeyeForConditionalGeneration` and `KeyeProcessor` load.

    The decoder keeps every weight and every id of its tokenizer. Special tokens of the stream that the tokenizer lacks
    use the padding rows of the embeddings (Qwen3 has 151,936 rows for 151,669 tokens), then new rows. A new row is the
    mean of the trained rows plus a tenth of their spread. With the mean, a new token changes the other probabilities
    least (a row with the usual standard deviation can have the largest logit before training). The spread is needed
    because equal rows of the head would get equal gradients and stay equal. Embeddings and an untied head are extended
    the same way.

    Args:
        text: directory of a Qwen3, Qwen2 or Llama (`ForCausalLM` or the bare decoder, safetensors), or the directory of
            `gguf_file`, all of which is converted to floats in memory.
        vision: directory of a SigLIP (the complete model or the vision model); its pooling head and text tower are not
            copied (stage 0 reads them from there, see `stages.contrastive`). A config instead of a directory gives the
            sizes of a randomly initialised tower; None gives those of the release.
        out: the directory to write.
        tokenizer: directory of the tokenizer if it is not the decoder's.
        gguf_file: name of a GGUF file in `text`.
        dtype: of all weights; the decoder's by default.
        max_shard: bytes of a file.
        seed: of the random initialisation.
        progress: called with (bytes written, total bytes).

    Raises:
        CheckpointError: a source that is missing, damaged or of another type, weights that do not fit their config, or
            `out` is not empty.
    """
    text = Path(text)
    base, grown = _tokenizers(Path(tokenizer or text), gguf_file if tokenizer is None else None)
    config = KeyeConfig(vision_config=_vision_config(vision), text_config=_text_config(text, gguf_file))
    report = Report()
    sources: dict[str, Stored | Computed] = {}
    for name, tensor in _decoder(text, gguf_file, dtype).items():
        ours = names.decoder_name(name)
        if ours is None or (ours == HEAD and config.tie_word_embeddings):
            report.left_out.setdefault("computed tables, or a head tied to the embeddings", []).append(name)
        else:
            sources[ours] = tensor
    if EMBEDDINGS not in sources:
        raise CheckpointError(f"{text}: no embed_tokens.weight; name the directory of a decoder such as Qwen3")
    dtype = dtype or sources[EMBEDDINGS].dtype
    pretrained = isinstance(vision, str | Path)
    for name, tensor in (open_checkpoint(vision) if pretrained else {}).items():
        ours = names.tower_name(name)
        if ours is None:
            report.left_out.setdefault("SigLIP's pooling head and text tower", []).append(name)
        else:
            sources[ours] = tensor

    processor = _processor(grown, config)
    old_ids, ids = set(base.get_vocab().values()), set(grown.get_vocab().values())
    rows = sources[EMBEDDINGS].shape[0]
    if rows != config.text_config.vocab_size or max(old_ids) >= rows:
        raise CheckpointError(
            f"{text}: {rows} embeddings, vocab_size {config.text_config.vocab_size}, largest token id {max(old_ids)}: "
            "they belong to different models; give the decoder's tokenizer"
        )
    if max(ids) >= rows:
        config.text_config.vocab_size = -(-(max(ids) + 1) // ROWS_MULTIPLE) * ROWS_MULTIPLE
    for name in (EMBEDDINGS, HEAD):
        if name in sources and (ids - old_ids or config.text_config.vocab_size != rows):
            sources[name] = _extended(sources[name], config.text_config.vocab_size, old_ids, ids - old_ids, seed)
            report.made.setdefault(f"{len(ids - old_ids)} rows of new tokens around the mean", []).append(name)
    config.dtype = dtype
    expected = expected_shapes(config)
    own = ("model.projector.",)
    drawn = [name for name in expected if name.startswith(own if pretrained else (*own, "model.visual."))]
    if config.vision_config.mixer != "attention" and drawn:
        raise CheckpointError(
            f"vision_config.mixer is {config.vision_config.mixer}: only a tower with attention is initialised here; "
            "give a recipe model.vision.mixer instead"
        )
    for i, name in enumerate(drawn):
        sources[name] = _drawn(name, expected[name], seed + 1 + i)
    report.made |= {"initialised at random": drawn}
    report.compare(sources, expected).refuse(text)
    with atomic_directory(out) as part:
        write_shards(_cast({name: sources[name] for name in expected}, dtype), part, max_shard, progress)
        config.architectures = [KeyeForConditionalGeneration.__name__]
        config.save_pretrained(part)
        processor.save_pretrained(part)
        _generation(text, grown).save_pretrained(part)
    return report


def expected_shapes(config: KeyeConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a directory of this config (without a tied head)."""
    with torch.device("meta"):
        model = KeyeForConditionalGeneration(config)
    tied = {HEAD} if config.tie_word_embeddings else set()
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def _tokenizers(path: Path, gguf_file: str | None) -> tuple[Any, Any]:
    """The unchanged tokenizer, and the one with the stream's special tokens."""
    from keye.processor.tokenizer import load_tokenizer, open_tokenizer

    return open_tokenizer(str(path), gguf_file), load_tokenizer(str(path), gguf_file)


def _processor(tokenizer: Any, config: KeyeConfig) -> Any:
    from keye.processor.processor import KeyeProcessor  # needs the video libraries; a model does not

    patch = config.vision_config.patch_size
    processor = KeyeProcessor(tokenizer, encoder={} if patch == 14 else {"token_side": 2 * patch})
    processor.configure(config)
    return processor


def _text_config(text: Path, gguf_file: str | None) -> PreTrainedConfig:
    try:
        config = AutoConfig.from_pretrained(text, **_gguf(gguf_file))
    except ImportError as error:
        raise CheckpointError(f"{text}: a GGUF file needs the package gguf; pip install 'keye[gguf]'") from error
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{text}: no decoder's config.json ({reason}); name the directory of a Qwen3, Qwen2 or Llama"
        ) from error
    if config.get_text_config() is not config:
        raise CheckpointError(f"{text}: a {config.model_type} is not only a decoder; name a Qwen3, Qwen2 or Llama")
    config._name_or_path, config.architectures = "", None  # of the source directory
    return config


def _vision_config(vision: str | Path | KeyeVisionConfig | None) -> KeyeVisionConfig:
    """The tower's sizes from a SigLIP's config.json; by default the released ones."""
    if vision is None or isinstance(vision, KeyeVisionConfig):
        return vision or KeyeVisionConfig()
    path = Path(vision) / "config.json"
    values = read_json(path)
    values = values.get("vision_config", values)
    if "siglip" not in str(values.get("model_type", "")) or "image_size" not in values:
        raise CheckpointError(f"{path}: not a SigLIP with a fixed image size; name a SigLIP such as so400m-patch14-384")
    if values.get("hidden_act", "gelu_pytorch_tanh") != "gelu_pytorch_tanh" or values.get("num_channels", 3) != 3:
        raise CheckpointError(
            f"{path}: the tower needs num_channels 3 and hidden_act gelu_pytorch_tanh; name a SigLIP such as "
            "so400m-patch14-384"
        )
    patch = values.get("patch_size", 16)
    sizes = {name: values[name] for name in names.VISION_FIELDS if name in values}
    return KeyeVisionConfig(**sizes | {"patch_size": patch, "position_grid": values["image_size"] // patch})


def _gguf(gguf_file: str | None) -> dict[str, str]:
    return {} if gguf_file is None else {"gguf_file": gguf_file}


def _decoder(text: Path, gguf_file: str | None, dtype: torch.dtype | None) -> Tensors:
    if gguf_file is None:
        return open_checkpoint(text)
    model = AutoModelForCausalLM.from_pretrained(text, gguf_file=gguf_file, dtype=dtype or torch.float32)
    return {name: in_memory(tensor) for name, tensor in model.state_dict().items()}


def _drawn(name: str, shape: tuple[int, ...], seed: int) -> Computed:
    """A tensor of the tower or the projector, initialised like transformers' SigLIP: Xavier, LeCun for the patches.

    Only the position table is larger (`keye.model.vision.POSITION_SHARE`).
    """

    def make() -> Tensor:
        tensor, generator = torch.zeros(shape), torch.Generator().manual_seed(seed)
        if name.endswith("bias"):
            return tensor
        if "norm" in name:
            return tensor + 1
        if "position_embedding" in name:
            return tensor.normal_(std=POSITION_SHARE, generator=generator)  # patches of unit pixels have 1
        if "patch_embedding" in name:
            return tensor.normal_(std=tensor[0].numel() ** -0.5, generator=generator)
        return nn.init.xavier_uniform_(tensor, generator=generator)

    return Computed(shape, torch.float32, make)


def _extended(table: Stored | Computed, rows: int, trained: set[int], new: set[int], seed: int) -> Computed:
    """`table` `[V, H]` with `rows` rows: `new` ones around the mean of the `trained`, the other added ones at it."""

    def make() -> Tensor:
        old = table.read()
        mean, deviation = _statistics(old, trained)
        result = torch.empty(rows, old.shape[1], dtype=old.dtype)
        result[: len(old)], result[len(old) :] = old, mean.to(old.dtype)
        generator = torch.Generator().manual_seed(seed)
        for row in sorted(new):
            drawn = torch.randn(len(mean), generator=generator)
            result[row] = (mean + NEW_ROW_SPREAD * deviation * drawn).to(old.dtype)
        return result

    return Computed((rows, table.shape[1]), table.dtype, make)


def _statistics(table: Tensor, trained: set[int]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the trained rows in each dimension `[H]`, float32, without a copy of the table."""
    known = torch.tensor(sorted(trained))
    total, squares = (torch.zeros(table.shape[1], dtype=torch.float64) for _ in range(2))
    for ids in known.split(4096):
        part = table[ids].double()
        total += part.sum(0)
        squares += part.square().sum(0)
    mean = total / len(known)
    return mean.float(), (squares / len(known) - mean.square()).clamp(min=0).sqrt().float()


def _cast(tensors: Mapping[str, Stored | Computed], dtype: torch.dtype) -> Tensors:
    cast: dict[str, Stored | Computed] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, Stored):
            # known_dtype refuses 8-bit floats: they need scales, which the model does not have.
            cast[name] = tensor if tensor.known_dtype == dtype else tensor.to(dtype)
        else:
            cast[name] = Computed(tensor.shape, dtype, _casting(tensor, dtype))
    return cast


def _casting(tensor: Computed, dtype: torch.dtype) -> Callable[[], Tensor]:
    return lambda: tensor.make().to(dtype)


def _generation(text: Path, tokenizer: Any) -> GenerationConfig:
    """The decoder's own generation config, with the end of a turn added to its end tokens."""
    known = (text / "generation_config.json").is_file()
    config = GenerationConfig.from_pretrained(text) if known else GenerationConfig()
    before = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ends = [tokenizer.eos_token_id, *(i for i in before if i is not None)]
    config.eos_token_id, config.pad_token_id = list(dict.fromkeys(ends)), tokenizer.pad_token_id
    return config
