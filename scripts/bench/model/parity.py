"""The model against transformers and against itself: the largest error of everything that must be the same."""

import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Qwen2VLConfig,
    Qwen2VLModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from keye import KeyeConfig, KeyeForConditionalGeneration
from keye.errors import run
from keye.model.attention import available, varlen
from keye.model.config import KeyeVisionConfig
from keye.model.vision import KeyeVisionModel
from scripts.bench.common import streams
from scripts.bench.common.record import Claim, Table, arguments, out_of, save
from scripts.bench.model.released_checkpoint import meta_counts, round_trip

FAMILIES = ("qwen3", "qwen2", "llama3")
TIGHT, LOOSE = 1e-5, 2**-6
EXAMPLES = "examples:\n  python -m scripts.bench model --part parity\n"
Found = Iterator[Claim]


def largest(ours: Tensor, theirs: Tensor) -> float:
    """The largest absolute difference."""
    return float((ours.double() - theirs.double()).abs().max())


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The norm of the difference over the norm."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-30))


def within(what: str, error: float, bound: float, kind: str = "largest error") -> Claim:
    return Claim(what, f"≤ {bound:.1g}", f"{error:.1e} ({kind})", met=error <= bound)


def tower_is_siglip(quick: bool) -> Found:
    """At 384×384 without rotary, the released widths."""
    depth = 1 if quick else 3
    sizes = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": depth, "num_attention_heads": 16}
    torch.manual_seed(0)
    siglip = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=384, patch_size=14)).eval()
    ours = KeyeVisionModel(KeyeVisionConfig(**sizes, rotary=False)).eval()
    ours.load_state_dict(
        {k.removeprefix("vision_model."): v for k, v in siglip.state_dict().items() if "head." not in k}
    )
    images = torch.randn(2, 3, 384, 384)
    patches = images[..., :378, :378].unfold(2, 14, 14).unfold(3, 14, 14).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    grid = torch.tensor([[1, 27, 27]] * 2)
    with torch.no_grad():
        expected = siglip(images).last_hidden_state.flatten(0, 1)
        yield within(
            f"tower at 384×384, rotary off, against SiglipVisionModel ({depth} layers of so400m)",
            largest(ours(patches, grid), expected),
            TIGHT,
        )


def tower_is_itself(quick: bool) -> Found:
    """Frames packed against each alone, bfloat16 against float32."""
    torch.manual_seed(0)
    tower = KeyeVisionModel(
        KeyeVisionConfig(hidden_size=288, intermediate_size=1076, num_hidden_layers=4, num_attention_heads=4)
    ).eval()
    draw = torch.Generator().manual_seed(1)
    sizes = torch.randint(1, 16 if quick else 31, (12, 2), generator=draw)
    grid = torch.cat((torch.ones(12, 1, dtype=torch.long), sizes), dim=1)
    counts = sizes.prod(1).tolist()
    pixels = torch.randn(sum(counts), 3, 14, 14, generator=draw)
    with torch.no_grad():
        whole = tower(pixels, grid)
        alone = torch.cat([tower(p, g[None]) for p, g in zip(pixels.split(counts), grid, strict=True)])
        yield within("tower, 12 frames of any sizes packed, against each alone", largest(whole, alone), TIGHT)
        half = copy.deepcopy(tower).bfloat16()(pixels.bfloat16(), grid)
    yield within("tower of 4 layers in bfloat16 against float32", relative(half, whole), LOOSE, "relative")


def untouched(model: KeyeForConditionalGeneration) -> nn.Module:
    """Transformers' own causal model with the same weights."""
    config = copy.deepcopy(model.config.text_config)
    config._attn_implementation = "eager"
    plain = AutoModelForCausalLM.from_config(config).eval()
    plain.model.load_state_dict(model.language_model.state_dict())
    plain.lm_head.load_state_dict(model.lm_head.state_dict())
    return plain


def text_is_transformers(quick: bool) -> Found:
    """Text alone, whole logits."""
    for name in FAMILIES:
        model = streams.family_model(name)
        ids = torch.randint(0, streams.WORDS, (2, 64 if quick else 400), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            error = largest(model(ids).logits, untouched(model)(ids).logits)
        yield within(f"text alone, {name}, logits against the untouched transformers model", error, TIGHT)


def positions_are_qwens(quick: bool) -> Found:
    """Random interleaved streams against Qwen2-VL's get_rope_index, each frame a video of one step."""
    vision = {"depth": 1, "embed_dim": 8, "num_heads": 1, "hidden_size": 8, "mlp_ratio": 1}
    text = {
        "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
        "num_key_value_heads": 1, "vocab_size": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    theirs = Qwen2VLModel(Qwen2VLConfig(vision_config=vision, text_config=text))
    model, draw, wrong, places = streams.family_model(), torch.Generator().manual_seed(5), 0, 0
    cases = 20 if quick else 300
    for seed in range(cases):
        count = int(torch.randint(1, 9, (1,), generator=draw))
        parts = [
            (streams.IMAGE if kind else streams.VIDEO, int(h), int(w))
            for kind, (h, w) in zip(
                torch.randint(0, 2, (count,), generator=draw).tolist(),
                torch.randint(1, 7, (count, 2), generator=draw).tolist(),
                strict=True,
            )
        ]
        inputs = streams.stream(parts, seed)
        ids, grids = inputs["input_ids"], {n: inputs[n] for n in ("image_grid_thw", "video_grid_thw") if n in inputs}
        kinds = (ids == streams.IMAGE).int() + 2 * (ids == streams.VIDEO).int()
        expected, _ = theirs.get_rope_index(ids, mm_token_type_ids=kinds, **grids)
        ours = model.positions(ids, None, grids.get("image_grid_thw"), grids.get("video_grid_thw"))
        wrong += int((ours != expected).any(dim=0).sum())
        places += ids.numel()
    claim = f"positions against Qwen2-VL's rule, {cases} random streams of stills, frames and text"
    yield Claim(claim, "0 differ", f"{wrong} of {places:,} differ", met=wrong == 0)


def cache_is_no_cache(quick: bool) -> Found:
    """Logits of greedy generation, step by step, against the whole stream each time."""
    for name in FAMILIES:
        model, inputs = streams.family_model(name), streams.stream(streams.frames((2, 3), (1, 1), (4, 2)), 5)
        steps = 4 if quick else 24
        found = model.generate(
            **inputs, max_new_tokens=steps, do_sample=False, eos_token_id=None, pad_token_id=0,
            output_logits=True, return_dict_in_generate=True, suppress_tokens=list(range(streams.WORDS, streams.VOCAB)),
        )  # fmt: skip
        ids, start = found.sequences, inputs["input_ids"].shape[1]
        with torch.no_grad():
            whole = model(**{**inputs, "input_ids": ids}).logits[0, start - 1 : -1]
        error = largest(torch.cat(found.logits), whole)
        yield within(f"generation with a cache against none, {name}, {steps} steps, logits", error, TIGHT)


STREAMS = (
    streams.stream([(streams.VIDEO, 2, 2), (streams.IMAGE, 1, 3), (streams.VIDEO, 1, 1)], 1),
    streams.stream([], 2),
    streams.stream([(streams.IMAGE, 2, 1), (streams.VIDEO, 1, 2), (streams.VIDEO, 5, 4)], 3),
)


def padded_is_single(_: bool) -> Found:
    """Rows of a left-padded batch against each alone."""
    batch = streams.padded(STREAMS, "left")
    for name in FAMILIES:
        model = streams.family_model(name)
        with torch.no_grad():
            rows = model(**batch).logits
            error = max(
                largest(rows[number, batch["attention_mask"][number].bool()], model(**one).logits[0])
                for number, one in enumerate(STREAMS)
            )
        yield within(f"left-padded batch against singles, {name}, logits", error, TIGHT)


def packed_is_separate(_: bool) -> Found:
    """Loss and gradients of one packed row against the documents apart; what a neighbour's change changes."""
    batch = streams.packed(STREAMS)
    count = int((batch["shift_labels"] != -100).sum())
    for name in FAMILIES:
        model = streams.family_model(name)
        loss = model(**batch, num_items_in_batch=count).loss
        loss.backward()
        together = {n: p.grad.clone() for n, p in model.named_parameters()}
        model.zero_grad()
        apart = torch.zeros(())
        for one in STREAMS:
            part = model(**one, labels=streams.labels(one["input_ids"]), num_items_in_batch=count).loss
            part.backward()
            apart += part.detach()
        grads = max(relative(together[n], p.grad) for n, p in model.named_parameters())
        yield within(f"packed against separate documents, {name}, loss", abs(float(loss.detach() - apart)), TIGHT)
        yield within(f"packed against separate documents, {name}, gradients", grads, 1e-4, "relative, worst weight")
        yield neighbours(name, model, batch)


def neighbours(name: str, model: KeyeForConditionalGeneration, batch: dict[str, Tensor]) -> Claim:
    """Text and a still of the first document are changed."""
    given = {key: value.clone() for key, value in batch.items() if key != "shift_labels"}
    end = int(given["cu_seqlens"][1])
    with torch.no_grad():
        before = model(**given).logits[0]
        given["input_ids"][0, 0] += 1
        given["pixel_values"][:4] += 1.0
        after = model(**given).logits[0]
    changed = (before != after).any(dim=1)
    figure = f"{int(changed[end:].sum())} of {len(changed) - end} rows of logits; its own: {int(changed[:end].sum())}"
    claim = f"packed neighbours of a changed document, {name}: rows changed in any bit"
    return Claim(claim, "0", figure, met=not changed[end:].any() and bool(changed[:end].any()))


def backends_are_plain(quick: bool) -> Found:
    """Every backend that runs here, forward and backward."""
    lengths = (1, 64, 64, 200, 7, 33) if quick else (1, 512, 512, 900, 7, 333, 64)
    cu_seqlens = torch.tensor((0, *lengths)).cumsum(0)
    draw = torch.Generator().manual_seed(3)
    drawn = [torch.randn(sum(lengths), heads, 64, generator=draw) for heads in (8, 2, 2, 8)]
    for backend in available("cpu"):
        for dtype, bound in ((torch.float32, TIGHT), (torch.bfloat16, LOOSE)):
            for causal in (True, False):
                found = _attention([x.to(dtype) for x in drawn], cu_seqlens, causal, backend)
                exact = _attention([x.to(dtype).double() for x in drawn], cu_seqlens, causal, "plain")
                worst = max(relative(a, b) for a, b in zip(found, exact, strict=True))
                claim = f"attention, {backend}, {'causal' if causal else 'both ways'}, {str(dtype)[6:]}"
                yield within(f"{claim}, output and gradients against plain in float64", worst, bound, "relative")


def _attention(drawn: list[Tensor], cu_seqlens: Tensor, causal: bool, backend: str) -> tuple[Tensor, ...]:
    q, k, v = (x.clone().requires_grad_() for x in drawn[:3])
    out = varlen(q, k, v, cu_seqlens, causal, backend=backend)
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), drawn[3]))


def recomputing_changes_nothing(_: bool) -> Found:
    """Activation checkpointing of tower and decoder."""
    model, found = streams.family_model().train(), []
    for on in (False, True):
        model.gradient_checkpointing_enable() if on else model.gradient_checkpointing_disable()
        model.zero_grad()
        model(**STREAMS[0], labels=streams.labels(STREAMS[0]["input_ids"])).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    yield within("gradients with activation checkpointing against without", largest(*found), TIGHT)


def released_names(quick: bool) -> Found:
    """A directory with released names in and out, and the 8B's shapes on the meta device."""
    with tempfile.TemporaryDirectory() as folder:
        config = KeyeConfig.preset("tiny", vocab_size=1024 if quick else 32_768)
        differ, count, values = round_trip(config, Path(folder))
    claim = f"ours → released names → ours, {count} tensors, {values:,} values: tensors that differ in any bit"
    yield Claim(claim, "0", f"{differ} of {count}", met=differ == 0)
    for claim, ours, facts in meta_counts():
        yield Claim(claim, f"{facts:,}", f"{ours:,}", met=ours == facts)


CHECKS: tuple[Callable[[bool], Found], ...] = (
    tower_is_siglip, tower_is_itself, text_is_transformers, positions_are_qwens, cache_is_no_cache, padded_is_single,
    packed_is_separate, backends_are_plain, recomputing_changes_nothing, released_names,
)  # fmt: skip


def main() -> None:
    args = arguments(__doc__, EXAMPLES, results="model").parse_args()
    began = time.monotonic()
    claims = []
    for number, check in enumerate(CHECKS, 1):
        print(f"{number}/{len(CHECKS)} {check.__name__.replace('_', ' ')}", flush=True)
        claims += check(args.quick)
    rows = [(claim.claim, claim.figure, claim.goal) for claim in claims]
    notes = ["Random weights and tokens from fixed seeds, float32 on a CPU unless a row says otherwise."]
    save(
        out_of(args), "parity", claims, [Table("What must be the same", ("what", "found", "goal"), rows)],
        seconds=time.monotonic() - began, quick=args.quick, notes=notes
    )  # fmt: skip


if __name__ == "__main__":
    run(main)
