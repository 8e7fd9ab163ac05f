"""Keye models in lmms-eval (0.7.3), found through the entry-point group `lmms_eval.models`.

    lmms-eval --model keye --model_args pretrained=runs/mine/gspo/model,max_tokens=16000 --tasks videomme

`model_args` are `pretrained`, `dtype`, `device`, `system_prompt`, `thinking`, and every setting of the encoder
(`EncoderConfig`). A clip is encoded with the slow-fast plan of these settings: neither frames nor frame types are
replaced by those of lmms-eval. Up to `--batch_size` answers are generated together.
"""

import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from loguru import logger
from tqdm import tqdm

from keye.checks import integer, suggestion
from keye.encoder_config import EncoderConfig
from keye.errors import CheckpointError, KeyeError
from keye.inference.answering import BatchedAnswering
from keye.inference.batching import BatchEngine
from keye.inference.chat import load_model
from keye.inference.sampling import Sampling
from keye.processor.messages import Message
from keye.processor.reply import parse_reply
from keye.slowfast.plan import VideoPlan

ARGUMENTS = ("pretrained", "device", "dtype", "batch_size", "max_batch_size", "system_prompt", "thinking")
GENERATION = ("max_new_tokens", "until", "temperature", "do_sample", "top_p", "top_k", "num_beams")
MAX_NEW_TOKENS = 128
"""Limit of an answer of a task that sets none."""


@contextmanager
def _one_sentence() -> Iterator[None]:
    """End the program with one sentence for a user's mistake: lmms-eval prints a traceback of any other exception."""
    try:
        yield
    except KeyeError as error:
        raise SystemExit(f"error: {error}") from error


class Keye(lmms):
    """A Keye model behind lmms-eval's interface for chat models.

    Args:
        pretrained: a model directory or hub id.
        device: "cpu", "cuda" or "cuda:1"; by default the GPU of this process, if there is one.
        dtype: "float32", "bfloat16" or "float16"; "auto" uses the saved dtype.
        batch_size: number of answers generated together.
        max_batch_size: unused; lmms-eval always passes it.
        system_prompt: text of the system's turn, or the path of a text file.
        thinking: True or False append `/think` or `/no_think` to each question; None appends nothing.
        encoder: settings of the encoder that replace those saved with the model.

    Raises:
        SystemExit: a wrong argument, or a directory that has no Keye model or no chat template; one sentence.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "",
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        system_prompt: str | None = None,
        thinking: bool | None = None,
        **encoder: Any,
    ) -> None:
        super().__init__()
        self._rank, self._world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        with _one_sentence():
            _check_names(pretrained, encoder)
            self.batch_size = integer("batch_size", int(batch_size) if str(batch_size).isdecimal() else batch_size)
            if thinking not in (None, True, False):
                raise KeyeError(f"model_args: thinking is {thinking!r}; give True or False, or leave it out")
            model, processor = load_model(pretrained, device or _own_device(), dtype)
            _check_template(pretrained)
            self.model, self.processor = model, processor.with_encoder(**encoder) if encoder else processor
        self.system_prompt = self._resolve_system_prompt(system_prompt) if system_prompt else None
        self.thinking, self.device = thinking, model.device
        self.context = model.config.text_config.max_position_embeddings
        self.counts: Counter[str] = Counter()
        """Clips, slow and fast frames and visual tokens of all requests so far."""
        if self.processor.encoder["policy"] == "all_slow":
            logger.warning("policy=all_slow: every frame is slow; leave policy out for the slow-fast plan")

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """The answer to each request, in their order.

        Raises:
            SystemExit: a clip that cannot be read, or a request that the model cannot answer; one sentence.
        """
        engine, began, results = BatchEngine(self.model, self.batch_size), time.monotonic(), []
        try:
            with _one_sentence(), ThreadPoolExecutor(self.batch_size) as pool:
                answers = pool.map(lambda request: self._answer(request, engine), requests)
                shown = tqdm(answers, "Model Responding", len(requests), disable=self.rank != 0)
                for result, plans in shown:
                    results.append(result)
                    for plan in plans:
                        slow, fast = plan.counts
                        self.counts.update(clips=1, slow=slow, fast=fast, tokens=plan.tokens)
        finally:
            engine.close()
        tokens, seconds = sum(result.token_counts.output_tokens for result in results), time.monotonic() - began
        log_metrics(total_gen_tokens=tokens, total_elapsed_time=seconds, avg_speed=tokens / seconds)
        kinds = f"{self.counts['slow']} slow and {self.counts['fast']} fast frames"
        logger.info(f"{self.counts['clips']} clips: {kinds}, {self.counts['tokens']} visual tokens")
        return results

    def _answer(self, request: Instance, engine: BatchEngine) -> tuple[GenerationResult, list[VideoPlan]]:
        """The answer to one request, and the plans of its clips."""
        # Six arguments, although the guide of lmms-eval says five.
        context, doc_to_messages, settings, doc_id, task, split = request.args
        try:
            messages = keye_messages(doc_to_messages(self.task_dict[task][split][doc_id]), self.system_prompt)
            sampling = sampling_of(settings, self.context)
            sample = self.processor.sample(
                messages,
                add_generation_prompt=True,
                thinking=self.thinking,
                max_length=self.context - sampling.max_new_tokens,
            )
        except KeyeError as error:
            raise type(error)(f"task {task}, document {doc_id}: {error}") from error
        inputs = self.processor.collate([sample])
        inputs.pop("labels")
        answering = BatchedAnswering(self.model, self.processor.tokenizer, inputs, sampling, engine=engine)
        for _ in answering:
            pass
        figures, reply = answering.figures, parse_reply(answering.text)
        # lmms-eval removes a thought by its tags, and knows no tags of an answer.
        text = reply.answer if reply.thinking is None else f"<think>{reply.thinking}</think>{reply.answer}"
        self.cache_hook.add_partial("generate_until", (context, settings), text)
        counts = TokenCounts(input_tokens=figures.prompt_tokens, output_tokens=figures.new_tokens)
        return GenerationResult(text, counts), sample.plans

    def loglikelihood(self, requests: Sequence[Instance]) -> NoReturn:
        raise SystemExit("error: keye answers tasks of type generate_until, not loglikelihood; use another task")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> NoReturn:
        raise SystemExit("error: keye answers tasks of one round, not generate_until_multi_round; use another task")


def _own_device() -> str:
    """The GPU of this process in a launch of several, or "auto"."""
    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if rank is not None and torch.cuda.is_available() else "auto"


def _check_names(pretrained: str, encoder: Mapping[str, Any]) -> None:
    """Refuse unknown model_args, and a missing `pretrained`."""
    known = (*(name for name in ARGUMENTS if "batch" not in name), *EncoderConfig.names())
    for name in encoder:
        if name not in known:
            raise KeyeError(f"model_args: {name} is not known; {suggestion(name, known)}")
    if not pretrained:
        raise KeyeError("model_args: pretrained is missing; give a model directory, as in pretrained=runs/mine/model")


def _check_template(directory: str) -> None:
    """Refuse a directory whose processor was saved without a chat template: another template would change scores."""
    folder = Path(directory)
    names = ("processor_config.json", "tokenizer_config.json")
    texts = [(folder / name).read_text(encoding="utf-8") for name in names if (folder / name).is_file()]
    if folder.is_dir() and not (folder / "chat_template.jinja").is_file() and '"chat_template"' not in "".join(texts):
        raise CheckpointError(
            f"{directory} has no chat template; copy the chat_template.jinja that the model was tuned with into it"
        )


def sampling_of(settings: Mapping[str, Any], context: int) -> Sampling:
    """A task's `generation_kwargs` as `Sampling`.

    Args:
        settings: see `GENERATION`; others have no meaning for this model and give a warning.
        context: the model's, of which an answer takes at most half.

    Raises:
        KeyeError: beam search, or a value out of range.
    """
    for name in settings:
        if name not in GENERATION:
            logger.warning(f"generation_kwargs: {name} is ignored; keye knows {', '.join(GENERATION)}")
    if (settings.get("num_beams") or 1) != 1:
        raise KeyeError(f"generation_kwargs: num_beams is {settings['num_beams']}; give 1, keye has no beam search")
    until = settings.get("until") or ()
    temperature = float(settings.get("temperature") or 0)
    greedy = settings.get("do_sample") is False or not temperature
    return Sampling(
        max_new_tokens=min(int(settings.get("max_new_tokens") or MAX_NEW_TOKENS), max(1, context // 2)),
        temperature=0.0 if greedy else temperature,
        top_p=None if greedy else settings.get("top_p"),
        top_k=None if greedy else settings.get("top_k"),
        stop=(until,) if isinstance(until, str) else tuple(text for text in until if text),
    )


def keye_messages(messages: Sequence[Mapping[str, Any]], system_prompt: str | None = None) -> list[Message]:
    """lmms-eval's chat messages as those of `KeyeProcessor.sample`.

    Raises:
        KeyeError: a message with sound.
    """
    found: list[Message] = []
    for message in ChatMessages(messages=list(messages)).messages:
        parts = [_part(part) for part in message.content]
        found.append({"role": message.role, "content": parts})
    if system_prompt:
        found = [message for message in found if message["role"] != "system"]
        found.insert(0, {"role": "system", "content": system_prompt})
    return found


def _part(part: Any) -> dict[str, Any]:
    if part.type == "text":
        return {"type": "text", "text": part.text}
    if part.type == "audio":
        raise KeyeError("a message has sound, which keye does not read; use a task without audio")
    source, times = part.url, {}
    if part.type == "video":
        times = {"start": part.start_time, "end": part.end_time}
    if isinstance(source, Mapping):  # a task that cuts its clips: {"url", "video_start", "video_end"}
        times = {"start": source.get("video_start"), "end": source.get("video_end")}
        source = next((source[key] for key in ("url", "path", "video") if source.get(key)), source)
    return {"type": part.type, part.type: source, **{key: value for key, value in times.items() if value is not None}}
