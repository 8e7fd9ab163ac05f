"""`keye trace`: which tokens carry a model's answer, in which blocks, and when the answer is settled."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from keye.errors import KeyeError, run, writing

EXAMPLES = """examples:
  keye trace runs/demo/annealing/model clip.mp4 --ask "Colour of the flash?"
  keye trace MODEL clip.mp4 --ask "Colour of the flash?" --out trace.html --json trace.json
  keye trace MODEL clip.mp4 --ask "Colour of the flash?" --against other.mp4 --out trace.html     also patching
  keye trace MODEL clip.mp4 --ask "Red or blue?" --answer blue --intended red --competing blue --map 3
  keye trace LM --ask "The capital of France is" --against "The capital of Italy is"    any causal LM of transformers
  keye trace DIR --gguf model.gguf --chat --ask "What is a bass?" --intended music --competing fish
"""


def main() -> None:
    args = _parser().parse_args()
    from keye.inference.terminal import quiet
    from keye.visualize.trace_page import write_trace

    quiet()
    if bool(args.intended) != bool(args.competing):
        raise KeyeError("--intended and --competing belong together; give words for both")
    found = _trace(args)
    print(report(found))
    if args.json:
        with writing(args.json, "the trace"):
            Path(args.json).write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"wrote {args.json}")
    if args.out:
        write_trace(args.out, found, str(args.model))
        print(f"wrote {args.out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Trace an answer: groups of tokens (frames, slow, fast, timestamps, question, words) are hidden "
        "from attention, and the answer's log-probability without them is compared.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="a directory of a Keye model, or of a causal LM for text")
    parser.add_argument("media", nargs="*", metavar="CLIP", help="clips and images of the question")
    parser.add_argument("--ask", required=True, metavar="TEXT", help="the question; of a causal LM the complete prompt")
    parser.add_argument("--answer", metavar="TEXT", help="trace this answer (default: the model's own)")
    parser.add_argument(
        "--against", action="append", metavar="CLIP", help="a counterfactual clip or image, once for each CLIP, whose "
        "pixels take its place; of a causal LM another prompt. Adds patching"
    )  # fmt: skip
    parser.add_argument("--intended", nargs="+", metavar="WORD", help="words of the intended reading, for CAS")
    parser.add_argument("--competing", nargs="+", metavar="WORD", help="words of the competing reading")
    parser.add_argument("--window", type=int, metavar="N", help="blocks of a window (default: an eighth of the depth)")
    parser.add_argument("--map", type=int, metavar="BLOCK", help="add the semantic map after this block, from 1")
    parser.add_argument("--out", metavar="HTML", help="write a page with the filmstrip coloured by effect")
    parser.add_argument("--json", metavar="PATH", help="write all values as JSON")
    parser.add_argument("--chat", action="store_true", help="of a causal LM: put the prompt into its chat template")
    parser.add_argument("--gguf", metavar="NAME", help="of a causal LM: the GGUF file in its directory")
    parser.add_argument("--device", default="auto", metavar="D", help="cpu, cuda or cuda:1 (default: the GPU if any)")
    parser.add_argument("--dtype", default="auto", metavar="T", help="float32, bfloat16 or float16 (default: as saved)")
    return parser


def _trace(args: argparse.Namespace) -> dict[str, Any]:
    from keye.evaluation.trace.trace import trace_text, trace_video

    if args.window is not None and args.window < 1:
        raise KeyeError(f"--window {args.window} is too small; give at least 1")
    options = {
        "answer": args.answer,
        "readings": (args.intended, args.competing) if args.intended else None,
        "window": args.window,
        "layer": None if args.map is None else args.map - 1,
        "progress": True,
    }
    if _is_keye(args.model):
        from keye.inference.chat import load_model

        if args.against and len(args.against) != len(args.media):
            raise KeyeError(f"--against is given {len(args.against)} times for {len(args.media)} clips; give one each")
        if args.chat or args.gguf:
            raise KeyeError("--chat and --gguf are for causal LMs; leave them out with a Keye model")
        model, processor = load_model(args.model, args.device, args.dtype)
        other = _messages(args.against, args.ask) if args.against else None
        return trace_video(model, processor, _messages(args.media, args.ask), counterfactual=other, **options)
    if args.media:
        raise KeyeError(f"{args.model} is no Keye model, which clips need; leave {args.media[0]} out")
    model, tokenizer = load_text(args.model, args.gguf, args.device, args.dtype)
    prompts = [_chat(tokenizer, text) if args.chat else text for text in (args.ask, *(args.against or ())[:1])]
    return trace_text(model, tokenizer, prompts[0], counterfactual=prompts[1] if prompts[1:] else None, **options)


def _messages(files: list[str], question: str) -> list[dict[str, Any]]:
    from keye.video.images import IMAGE_SUFFIXES

    kinds = ["image" if Path(file).suffix.lower() in IMAGE_SUFFIXES else "video" for file in files]
    parts = [{"type": kind, kind: file} for kind, file in zip(kinds, files, strict=True)]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def _is_keye(directory: str) -> bool:
    """Whether a directory has a Keye model; a hub id counts as one, because a text model needs a directory."""
    path = Path(directory) / "config.json"
    if not Path(directory).is_dir():
        return True  # load_model explains what is missing
    return path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("model_type", "").startswith("Keye")


def _chat(tokenizer: Any, text: str) -> str:
    if not tokenizer.chat_template:
        raise KeyeError("the tokenizer has no chat template; leave --chat out")
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def load_text(directory: str, gguf: str | None = None, device: str = "auto", dtype: str = "auto") -> tuple[Any, Any]:
    """A causal LM of transformers and its tokenizer, with sdpa attention (eager where the model has none).

    Args:
        directory: of the model.
        gguf: the GGUF file in it; needs the package gguf.
        device, dtype: as for `keye.inference.chat.load_model`.

    Raises:
        KeyeError: a directory without a causal LM.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    more = {"gguf_file": gguf} if gguf else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, **more)
        try:
            model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa", **more)
        except ValueError:
            model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager", **more)
    except (OSError, ValueError, KeyError) as error:
        raise KeyeError(
            f"{directory} has no causal LM that transformers can load ({str(error).splitlines()[0][:200]}); give a "
            "directory with config.json and weights, or --gguf with the name of a GGUF file in it"
        ) from error
    return model.to(place).eval(), tokenizer


def report(trace: dict[str, Any]) -> str:
    """The trace as lines of text: the answer, the strongest groups, shares and commitment."""
    lines = [f"answer      {trace['answer']}  ({math.exp(trace['answer_log_prob']):.1%})"]
    lines.append(f"{'group':<24}{'tokens':>8}{'effect, nats':>14}{'direct':>9}{'attention':>11}")
    frames = [group for group in trace["groups"] if group["kind"] in ("frame", "image", "word")]
    frames = sorted(frames, key=lambda group: -abs(group["nats"]))[:8]
    for group in (*frames, *(group for group in trace["groups"] if group["kind"] not in ("frame", "image", "word"))):
        name = group["name"] + ("" if group["seconds"] is None else f", {group['seconds']:.1f} s")
        lines.append(
            f"{name[:23]:<24}{group['tokens']:>8}{group['nats']:>+14.2f}{group['answer_nats']:>+9.2f}"
            f"{group['attention']:>11.1%}"
        )
    for kind, share in trace["shares"].items():
        effect = "no effect" if share["effect"] is None else f"{share['effect']:.0%} of the visual effect"
        lines.append(f"{kind:<12}{effect}, {share['tokens']:.0%} of the visual tokens")
    if trace["commitment"]["by_cut"] is None:
        lines.append("committed   no: the model's own answer begins with another token")
    else:
        by_cut, by_lens = (_block(trace["commitment"][name], trace["depth"]) for name in ("by_cut", "by_lens"))
        lines.append(f"committed   by cut {by_cut}, by lens {by_lens}")
    if "counterfactual" in trace:
        other = trace["counterfactual"]
        lines.append(f"against     {other['answer']}" + (f"  ({other['note']})" if "note" in other else ""))
        if "handed_over" in other:
            at = other["handed_over"]
            said = (
                "does not restore the answer"
                if at == trace["depth"]
                else (f"restores the answer {_block(at + 1, trace['depth'])}")
            )
            lines.append(f"            the last token's state {said}")
    return "\n".join(lines)


def _block(done: int, depth: int) -> str:
    """How many blocks have run."""
    return "before the first block" if not done else f"after block {done} of {depth}"


if __name__ == "__main__":
    run(main)
