"""What vision costs in a training pass: the same pack with less and less of it, from pixels down to the layers alone.

Forward and backward passes of the complete model over a pack of documents from real plans, without an optimizer.
"""

import time
from collections.abc import Callable, Sequence
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from keye.model import flops
from keye.model.config import KeyeConfig
from keye.model.keye import KeyeForConditionalGeneration
from scripts.bench.common.record import Claim, Table
from scripts.bench.common.timing import in_turn, ratio
from scripts.bench.gpu.journal import Journal, Values, begin_peak, cell, peak_gb, synchronize
from scripts.bench.gpu.plans import DecodedPlan, document, pack, words
from stages.distributed.activation_memory import compile_layers

VISUAL = 0.8  # share of visual tokens
RATE_GOAL, CEILING_GOAL = 0.95, 0.55
WHOLE, FEATURES, TEXT, ALL_LABELS, LAYERS = (
    "whole pack", "visual features given", "text in the place of the frames", "text, every token learnt",
    "decoder layers alone",
)  # fmt: skip
COLUMNS = ("model", "pass", "ms", "TFLOP/s", "of the ceiling", "GB at the peak")


def model_of(small: bool, device: torch.device, dtype: torch.dtype) -> KeyeForConditionalGeneration:
    """Half the layers of tower and decoder of the 8B model: weights, gradients and activations fit in 140 GB."""
    if small:
        config = KeyeConfig.preset("tiny", vocab_size=300, num_hidden_layers=2)
        config.vision_config.num_hidden_layers = 2
    else:
        config = KeyeConfig.preset("keye_8b", num_hidden_layers=18)
        config.vision_config.num_hidden_layers = 14
    config.image_token_id, config.video_token_id = 1, 2
    torch.manual_seed(0)
    with torch.device(device):
        return KeyeForConditionalGeneration(config).to(dtype).train()


def packs_of(plans: Sequence[DecodedPlan], config: Any, small: bool, count: int) -> list[list[dict[str, Tensor]]]:
    """Documents of `count` packs of 8,192 tokens (small: 96) in documents of drawn lengths."""
    draw, length = torch.Generator().manual_seed(0), 96 if small else 8192
    found = []
    for number in range(count):
        cuts = torch.randint(length // 8, length // 2, (2,), generator=draw).tolist()
        lengths = [*cuts, length - sum(cuts)]
        shares = (VISUAL + 0.3 * (torch.rand(len(lengths), generator=draw) - 0.5)).tolist()
        parts = zip(lengths, shares, strict=True)
        found.append(
            [document(plans, config, size, share, number * 10 + at) for at, (size, share) in enumerate(parts) if size]
        )
    return found


def to_device(samples: list[dict[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in pack(samples).items()}


def operations(config: Any, batch: dict[str, Tensor], vision: bool = True, head: bool = True) -> int:
    """Operations of a pass, by what it computes."""
    frames = [tuple(size) for size in batch["video_grid_thw"][:, 1:].tolist()] if vision else []
    labels = int((batch["shift_labels"] != -100).sum()) if head else 0
    return flops.training_step(config, frames, batch["cu_seqlens"].diff().tolist(), labels)


def passes_of(
    model: KeyeForConditionalGeneration, batch: dict[str, Tensor]
) -> dict[str, tuple[Callable[[], None], int]]:
    """Each pass with its operations; every pass is forward and backward."""
    config, ids = model.config, batch["input_ids"]
    no_pixels = {name: value for name, value in batch.items() if name not in ("pixel_values_videos", "video_grid_thw")}
    visual = ids == config.video_token_id
    drawn = words(config, ids.numel(), torch.Generator().manual_seed(7)).view_as(ids).to(ids.device)
    text = no_pixels | {"input_ids": torch.where(visual, drawn, ids)}
    learnt = torch.where(batch["shift_labels"] == -100, drawn, batch["shift_labels"])
    width, dtype = config.text_config.hidden_size, model.dtype
    features = torch.randn(int(visual.sum()), width, device=ids.device, dtype=dtype).requires_grad_()
    embeds = torch.randn(1, ids.numel(), width, device=ids.device, dtype=dtype).requires_grad_()

    def learn(inputs: dict[str, Tensor]) -> Callable[[], None]:
        def call() -> None:
            model.zero_grad(set_to_none=True)
            model(**inputs).loss.backward()

        return call

    def layers() -> None:
        model.zero_grad(set_to_none=True)
        # The model's own call, whose mask of a packed row the decoder needs. The ids are those of words.
        inputs = {name: no_tower[name] for name in ("input_ids", "position_ids", "cu_seqlens", "visual_features")}
        hidden = model.model(**inputs, inputs_embeds=embeds).last_hidden_state
        hidden.backward(embeds.detach())

    given = no_pixels | {"visual_features": features}
    # Without features, training runs the tower over an empty frame, so that every rank issues the same collectives.
    no_tower = text | {"visual_features": features.detach()[:0]}
    all_learnt = no_tower | {"shift_labels": learnt}
    return {
        WHOLE: (learn(batch), operations(config, batch)),
        FEATURES: (learn(given), operations(config, batch, vision=False)),
        TEXT: (learn(no_tower), operations(config, text, vision=False)),
        ALL_LABELS: (learn(all_learnt), operations(config, all_learnt, vision=False)),
        LAYERS: (layers, operations(config, batch, vision=False, head=False)),
    }


def measure(
    journal: Journal, plans: Sequence[DecodedPlan], dtype: torch.dtype, compiler: str, rounds: int, packs: int
) -> Values:
    """Times of every pass; compiler: of the layers, "" for none."""
    device = journal.device
    model = model_of(journal.small, device, dtype)
    if compiler:
        compile_layers(model, compiler)
    samples = packs_of(plans, model.config, journal.small, packs)
    batches = [to_device(some, device) for some in samples]
    passes, peaks = passes_of(model, batches[0]), {}
    for name, (call, _) in passes.items():
        call()
        begin_peak(device)
        call()
        peaks[name] = peak_gb(device)
    times = in_turn({name: call for name, (call, _) in passes.items()}, rounds, device)
    each = {str(number): passes_of(model, batch)[WHOLE][0] for number, batch in enumerate(batches)}
    spread = [median(some) for some in in_turn(each, max(1, rounds // 3), device).values()]
    model.zero_grad(set_to_none=True)
    return {
        "times": times,
        "flops": {name: work for name, (_, work) in passes.items()},
        "peaks": peaks,
        "packs": spread,
        "host": host_seconds(samples, device),
        "visual": float((batches[0]["input_ids"] == model.config.video_token_id).float().mean()),
    }


def host_seconds(samples: Sequence[list[dict[str, Tensor]]], device: torch.device) -> float:
    """Median seconds by the clock to join samples to a pack and move it to the device."""
    taken = []
    for some in samples:
        began = time.perf_counter()
        to_device(some, device)
        synchronize(device)
        taken.append(time.perf_counter() - began)
    return median(taken)


def tables_of(journal: Journal, ceiling: float) -> list[Table]:
    """Every pass, and the differences between them."""
    rows, costs = [], []
    for key, found in journal.found.items():
        if not key.startswith("waterfall"):
            continue
        name = key.removeprefix("waterfall, ")
        took = {one: median(times) for one, times in found["times"].items()}
        for one, seconds in took.items():
            rate = found["flops"][one] / seconds
            share = f"{rate / ceiling:.0%}" if ceiling else "–"
            rows.append((name, one, f"{seconds * 1e3:.1f}", f"{rate / 1e12:.3g}", share, cell(found["peaks"][one])))
        whole, slowest = took[WHOLE], max(found["packs"]) / fmean(found["packs"])
        parts = {
            "tower and projector": whole - took[FEATURES],
            "placeholders and positions": took[FEATURES] - took[TEXT],
            "logits and loss of the labels": took[TEXT] - took[LAYERS],
            "decoder layers": took[LAYERS],
            "host: collate and copy to the device, if nothing hides it": found["host"],
            "imbalance: slowest of the packs over their mean": (slowest - 1) * whole,
        }
        costs += [(name, part, f"{seconds * 1e3:.1f}", f"{seconds / whole:.1%}") for part, seconds in parts.items()]
    return [
        Table("Passes of the model over one pack, forward + backward", COLUMNS, rows),
        Table("What a pack is spent on", ("model", "part", "ms", "of the whole pass"), costs),
    ]


def claims_of(journal: Journal, ceiling: float) -> list[Claim]:
    """The rate of the multimodal pack against the text-only pack, and against the ceiling."""
    claims = []
    for key, found in journal.found.items():
        if key.startswith("waterfall"):
            rates = {one: [found["flops"][one] / t for t in times] for one, times in found["times"].items()}
            share = ratio(rates[WHOLE], rates[ALL_LABELS])
            figure = f"{median(rates[WHOLE]) / 1e12:.3g} against {median(rates[ALL_LABELS]) / 1e12:.3g} TFLOP/s"
            claim = f"{key}: FLOP rate of a multimodal pack, {found['visual']:.0%} visual, against a text-only pack"
            claims.append(Claim(claim, f"≥ {RATE_GOAL:.0%}", figure, f"{share:.1%}", share >= RATE_GOAL))
            if ceiling:
                of = median(rates[WHOLE]) / ceiling
                claim = f"{key}: share of the measured ceiling, pack of 8,192 tokens"
                claims.append(Claim(claim, f"≥ {CEILING_GOAL:.0%}", f"{of:.0%}", met=of >= CEILING_GOAL))
    return claims
