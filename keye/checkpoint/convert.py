"""Model directories in and out: pretrained parts → Keye (`initialise`), the released Keye-VL-1.5-8B → Keye and back.

Conversions go from directory to directory without building the model. Only names, `config.json` and the processor's
files change, so a conversion and its inverse give the same bytes for every tensor. The parts of the release that our
model does not have (its pooling head, a position table it never reads, its code and settings) are kept in the folder
`released` of the converted directory and are restored on export.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from keye.checkpoint import released_layout as names
from keye.checkpoint.initialise import expected_shapes, initialise
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
    write_json,
    write_shards,
)
from keye.checks import integer
from keye.encoder_config import EncoderConfig
from keye.errors import CheckpointError, KeyeError
from keye.model.config import KeyeConfig
from keye.model.keye import KeyeForConditionalGeneration

__all__ = [
    "Report", "check", "convert_released", "export_released", "initialise", "load_released", "open_weights",
    "save_released",
]  # fmt: skip

RELEASED_FOLDER = "released"  # folder of a converted directory
PIXELS = ("min_pixels", "max_pixels")  # of an image, in preprocessor_config.json
SETTINGS = ("config.json", "preprocessor_config.json", "processor_config.json")
# All files of a tokenizer come from one directory.
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
LARGEST_SIDE_FILE = 16 << 20  # bytes; code, settings, tokenizers and notices are smaller than this


def check(directory: str | Path) -> Report:
    """Check how the weights of a directory, ours or the release's, fit its config.json; only headers are read.

    Raises:
        CheckpointError: no config.json or no readable weights.
    """
    values = read_json(Path(directory) / "config.json")
    expected = expected_shapes(_config(values, Path(directory)))
    stored, report = open_checkpoint(directory), Report()
    if names.is_released(values):
        stored = _needed(stored, report)
    return report.compare(stored, expected)


def open_weights(directory: str | Path) -> tuple[KeyeConfig, dict[str, Stored]]:
    """The config of a directory, ours or the release's, and its tensors under our names; only headers are read.

    The tensors are those of a model with this config, in its order, without a head that is tied to the embeddings.

    Raises:
        CheckpointError: no config.json, no readable weights, or weights that are missing or of another shape.
    """
    values = read_json(Path(directory) / "config.json")
    config = _config(values, Path(directory))
    expected, stored, report = expected_shapes(config), open_checkpoint(directory), Report()
    if names.is_released(values):
        stored = _needed(stored, report)
    report.compare(stored, expected).refuse(directory)
    return config, {name: stored[name] for name in expected}


def load_released(
    directory: str | Path, *, allow_missing: bool = False, **kwargs: Any
) -> tuple[KeyeForConditionalGeneration, Report]:
    """Load the model of a directory with released names, and report how its weights fit.

    Args:
        directory: of the release.
        allow_missing: initialise missing weights at random instead of raising an error.
        **kwargs: for `from_pretrained`.

    Raises:
        CheckpointError: weights of other shapes, or missing ones unless `allow_missing`.
    """
    report = check(directory)
    report.refuse(directory, allow_missing)
    return KeyeForConditionalGeneration.from_pretrained(directory, **{"dtype": "auto", **kwargs}), report


def convert_released(
    source: str | Path,
    out: str | Path,
    *,
    allow_missing: bool = False,
    max_shard: int = MAX_SHARD,
    progress: Progress | None = None,
) -> Report:
    """A directory with released names → one in our layout, with our processor's files.

    Args:
        source: of the release.
        out: the directory to write.
        allow_missing: accept missing weights.
        max_shard: bytes of a file.
        progress: called with (bytes written, total bytes).

    Raises:
        CheckpointError: not the released layout, damaged or missing shards, weights that do not fit the config, a
            tokenizer with more tokens than embeddings, or `out` is not empty.
    """
    source = Path(source)
    values = read_json(source / "config.json")
    if not names.is_released(values):
        if "text_config" in values:
            raise CheckpointError(
                f"{source}: config.json is in Keye's own layout (it has text_config); load the directory as it is, or "
                "name the downloaded release"
            )
        raise CheckpointError(
            f"{source} is not a released Keye-VL-1.5 directory; name the directory of the downloaded release"
        )
    config, report, stored = _config(values, source), Report(), open_checkpoint(source)
    ours = _needed(stored, report)
    expected = expected_shapes(config)
    report.compare(ours, expected).refuse(source, allow_missing)
    processor = _processor(source, config)
    with atomic_directory(out) as part:
        write_shards({name: ours[name] for name in expected if name in ours}, part, max_shard, progress)
        config.architectures = [KeyeForConditionalGeneration.__name__]
        config.save_pretrained(part)
        _copy(source, part, only=("generation_config.json",))
        if processor is not None:
            processor.save_pretrained(part)
        else:
            report.notes.append("the source has no tokenizer, so no processor files were written")
        _copy(source, part / RELEASED_FOLDER, without=TOKENIZER)
        extra = _beyond(stored, expected)
        if extra:
            write_shards(extra, part / RELEASED_FOLDER)
    return report


def export_released(
    source: str | Path,
    out: str | Path,
    *,
    like: str | Path | None = None,
    max_shard: int = MAX_SHARD,
    progress: Progress | None = None,
) -> Report:
    """A directory in our layout → one with released names and config.json, as vLLM and the release's code load it.

    Args:
        source: in our layout.
        out: the directory to write.
        like: a released directory whose code files and settings are copied; by default those kept at conversion.
            Engines run the release's own processor code (`auto_map` and the *.py files), which is not part of this
            project: without either source the export does not have it.
        max_shard: bytes of a file.
        progress: called with (bytes written, total bytes).

    Raises:
        CheckpointError: a model that engines cannot build (`names.config_to_released`), or see `convert_released`.
    """
    source = Path(source)
    values = read_json(source / "config.json")
    if names.is_released(values):
        raise CheckpointError(
            f"{source}: config.json is in the released layout already; use the directory as it is, or name one in "
            "Keye's own layout"
        )
    config, stored = _config(values, source), open_checkpoint(source)
    side = Path(like) if like is not None else source / RELEASED_FOLDER
    report = Report().compare(stored, expected_shapes(config))
    report.refuse(source)
    with atomic_directory(out) as part:
        _copy(source, part)
        _export(stored, config, part, side, report, max_shard, progress)
    return report


def save_released(
    model: KeyeForConditionalGeneration,
    processor: Any,
    out: str | Path,
    *,
    like: str | Path | None = None,
    max_shard: int = MAX_SHARD,
    progress: Progress | None = None,
) -> Report:
    """Write a model and its `KeyeProcessor` with released names; arguments and errors: see `export_released`."""
    expected = expected_shapes(model.config)
    state = model.state_dict()
    report = Report().compare({name: in_memory(state[name]) for name in expected}, expected)
    with atomic_directory(out) as part:
        processor.save_pretrained(part)
        model.generation_config.save_pretrained(part)
        tensors = {name: in_memory(state[name]) for name in expected}
        side = Path(like) if like is not None else None
        _export(tensors, model.config, part, side, report, max_shard, progress)
    return report


def _export(
    tensors: Tensors,
    config: KeyeConfig,
    part: Path,
    side: Path | None,
    report: Report,
    max_shard: int,
    progress: Progress | None,
) -> None:
    """Turn `part`, which has our processor's files, into a released directory."""
    theirs = {names.to_released(name): tensor for name, tensor in tensors.items()}
    kept = {}
    if side is not None and side.is_dir():
        if any(side.glob("*.safetensors")):
            kept = _beyond(open_checkpoint(side), expected_shapes(config))
            kept = {name: tensor for name, tensor in kept.items() if name not in theirs}
        _copy(side, part, without=(*SETTINGS, *TOKENIZER, "generation_config.json"), over=False)
    given = {name: _settings(side, name) for name in SETTINGS}
    if names.PACKING not in kept:
        first = theirs["visual.vision_model.embeddings.patch_embedding.weight"]
        shape = names.PACKING_ROWS, config.vision_config.hidden_size
        kept[names.PACKING] = Computed(shape, first.dtype, lambda: torch.zeros(shape, dtype=first.dtype))
        report.made["zeros that engines load and never use"] = [names.PACKING]
    write_shards(theirs | kept, part, max_shard, progress)

    values = config.to_dict()
    flat = names.config_to_released({**values, "dtype": values.get("dtype") or _dtype_name(theirs)})
    write_json(part / "config.json", _merged(given["config.json"], flat))
    ours = {**_settings(part, "preprocessor_config.json"), **_settings(part, "processor_config.json")}
    mine = {key: ours[key] for key in ("encoder", "image") if key in ours}
    image = names.preprocessor(ours.get("image"))
    for key in PIXELS:
        before = _pixels(given["preprocessor_config.json"], key, Path(side or part) / "preprocessor_config.json")
        if not ours.get("image") and before or before // names.TOKEN_SIDE**2 == image[key] // names.TOKEN_SIDE**2:
            image[key] = image["size"][key] = before  # the release's own number, if it means the same
    code = given["preprocessor_config.json"].get("auto_map") or given["processor_config.json"].get("auto_map")
    write_json(part / "preprocessor_config.json", {**given["preprocessor_config.json"], **image, **mine})
    _tokenizer_for_engines(part)
    named = {"processor_class": image["processor_class"], **({"auto_map": code} if code else {})}
    write_json(part / "processor_config.json", {**given["processor_config.json"], **mine, **named})


def _tokenizer_for_engines(part: Path) -> None:
    """Rewrite the tokenizer config of transformers 5 so that 4, which engines may use, reads it as well."""
    values = _settings(part, "tokenizer_config.json")
    if not values:
        return
    if isinstance(values.get("extra_special_tokens"), list):
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    values["processor_class"] = names.PROCESSOR_CLASS
    here = ("backend", "is_local", "local_files_only")  # of the process that saved the file
    write_json(part / "tokenizer_config.json", {key: value for key, value in values.items() if key not in here})


def _merged(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The release's config.json with our values; equivalent values stay as in the release."""
    vision = {**before.get("vision_config", {}), **now["vision_config"]}
    size, patch = before.get("vision_config", {}).get("image_size"), vision["patch_size"]
    if size and size // patch == vision["image_size"] // patch:
        vision["image_size"] = size  # 384 of the release is 27 patches, as 378 is
    rest = {key: value for key, value in before.items() if key not in ("dtype", "rope_parameters", "text_config")}
    return {**rest, **now, "vision_config": vision}


def _needed(stored: dict[str, Stored], report: Report) -> dict[str, Stored]:
    """Released tensors under our names, without those that the model does not need."""
    ours = {}
    for name, tensor in stored.items():
        why = names.unused(name)
        if why is None:
            ours[names.from_released(name)] = tensor
        else:
            report.left_out.setdefault(why, []).append(name)
    return ours


def _beyond(stored: dict[str, Stored], expected: dict[str, Any]) -> dict[str, Stored]:
    """Tensors of a released directory that our model does not have, under their own names."""
    return {name: t for name, t in stored.items() if names.from_released(name) not in expected}


def _config(values: dict[str, Any], directory: Path) -> KeyeConfig:
    """A `KeyeConfig` of either layout."""
    if values.get("model_type") != names.MODEL_TYPE:
        raise CheckpointError(
            f"{directory}: config.json has model_type {values.get('model_type')!r}, a Keye-VL-1.5 has "
            f"{names.MODEL_TYPE!r}; make one from a decoder and a SigLIP with keye convert init"
        )
    try:
        return KeyeConfig.from_dict(values)
    except CheckpointError as error:
        raise CheckpointError(f"{directory / 'config.json'}: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, StrictDataclassError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(
            f"{directory / 'config.json'}: not the config of a Keye-VL-1.5 ({reason}); download or save it again"
        ) from error


def _processor(source: Path, config: KeyeConfig) -> Any | None:
    """Our processor for a released directory, with the release's decisions; None if it has no tokenizer."""
    if not any((source / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
        return None
    from keye.encoder import SlowFastEncoder  # needs the video libraries; weights do not
    from keye.processor.processor import KeyeProcessor
    from keye.processor.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(source))
    rows = config.text_config.vocab_size
    if max(tokenizer.get_vocab().values()) >= rows:
        raise CheckpointError(
            f"{source}: {len(tokenizer)} tokens with the special ones, but {rows} embeddings; the tokenizer and the "
            "weights belong to different models: download both again"
        )
    path, given = source / "preprocessor_config.json", _settings(source, "preprocessor_config.json")
    limits = {name.replace("pixels", "tokens"): _pixels(given, name, path) // names.TOKEN_SIDE**2 for name in PIXELS}
    # The two tables are in a directory that `export_released` wrote, with the settings the model was trained with.
    encoder = given.get("encoder", SlowFastEncoder.released().settings)
    image = given.get("image", {key: value for key, value in limits.items() if value})
    try:
        processor = KeyeProcessor(tokenizer, EncoderConfig.saved(encoder), image)
    except KeyeError as error:
        raise CheckpointError(f"{path}: {error}; or remove the key for the released settings") from error
    processor.configure(config)
    return processor


def _copy(
    source: Path, out: Path, only: tuple[str, ...] = (), without: tuple[str, ...] = (), over: bool = True
) -> None:
    """Copy the small files that are not weights: settings, tokenizer, code, notices."""
    out.mkdir(exist_ok=True)
    for path in sorted(source.iterdir()):
        weights = path.suffix in (".safetensors", ".bin", ".gguf", ".pt") or path.name.endswith(".index.json")
        if not path.is_file() or weights or path.name in without or (only and path.name not in only):
            continue
        if path.stat().st_size <= LARGEST_SIDE_FILE and (over or not (out / path.name).exists()):
            shutil.copyfile(path, out / path.name)


def _pixels(values: dict[str, Any], key: str, path: Path) -> int:
    """A limit of an image in pixels in the release's preprocessor_config.json at `path`; 0 for none."""
    return integer(f"{path}: {key}", values.get(key) or 0, 0, error=CheckpointError)


def _settings(folder: Path | None, name: str) -> dict[str, Any]:
    """A JSON file of a folder, {} if there is none."""
    return read_json(folder / name) if folder is not None and (folder / name).is_file() else {}


def _dtype_name(tensors: Tensors) -> str | None:
    dtype = next(iter(tensors.values())).dtype
    return None if dtype is None else str(dtype).removeprefix("torch.")
