"""Tokenizers: byte-level BPE trained on given texts, or pretrained ones, with the special tokens of the stream.

A pretrained tokenizer (Qwen3's, for example) is named by its directory or hub id; `with_special_tokens` adds the tokens
that it lacks.
"""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from keye.errors import CheckpointError
from keye.processor.stream import CHAT_TEMPLATE, END_OF_TEXT, IM_END, IM_START, SPECIAL_TOKENS


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most `vocab_size` entries, the special tokens first; every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r"\d| ?[A-Za-z]+|\s+|[^\sA-Za-z\d]"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return with_special_tokens(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


def with_special_tokens(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Add the missing special tokens of the stream, and set the end and padding tokens.

    Existing tokens keep their ids. A turn ends with `<|im_end|>`; padding is `<|endoftext|>`, as in Qwen and SmolLM2,
    so that padding is never learnt as an end. If a tokenizer starts every text with a token of its own (Llama's `<s>`
    or `<|begin_of_text|>`), the chat template starts with it, because its decoder was trained that way; Qwen's and
    SmolLM2's do not.

    Raises:
        CheckpointError: the ids of a word after a special token differ from those of the word alone, so that turns
            cannot be found by ids.
    """
    begin = _beginning(tokenizer)
    # In one call: special tokens stay special, and an ordinary token becomes special under its id.
    others = [token for token in tokenizer.all_special_tokens if token not in SPECIAL_TOKENS]
    tokenizer.add_special_tokens({"additional_special_tokens": [*SPECIAL_TOKENS, *others]})
    tokenizer.eos_token, tokenizer.pad_token = IM_END, END_OF_TEXT
    tokenizer.chat_template = ("" if begin is None else "{{- '" + begin + "' -}}") + CHAT_TEMPLATE
    _check_turns(tokenizer)
    return tokenizer


def _beginning(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """The token that this tokenizer puts before every text, None if there is none."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token if ids and ids[0] == tokenizer.bos_token_id else None


def _check_turns(tokenizer: PreTrainedTokenizerFast) -> None:
    """Labels are found by the ids of "assistant" after `<|im_start|>`: they must equal those of the word alone."""
    ids = tokenizer(f"{IM_START}assistant\nYes{IM_END}", add_special_tokens=False)["input_ids"]
    word = tokenizer("assistant\n", add_special_tokens=False)["input_ids"]
    if ids[1 : 1 + len(word)] != word:
        raise CheckpointError(
            f"{tokenizer.name_or_path or 'tokenizer'}: the ids of a word after {IM_START} differ from its own (a "
            "SentencePiece tokenizer with a leading space?); use a byte-level one, such as Qwen's or SmolLM2's"
        )


def open_tokenizer(path: str, gguf_file: str | None = None) -> PreTrainedTokenizerFast:
    """An unchanged pretrained tokenizer, from a directory, a hub id or a GGUF file in a directory.

    Raises:
        CheckpointError: no tokenizer there, or a GGUF file without the package that reads it.
    """
    try:
        return AutoTokenizer.from_pretrained(path, **({} if gguf_file is None else {"gguf_file": gguf_file}))
    except ImportError as error:
        package = "sentencepiece" if gguf_file is None else "'keye[gguf]'"
        reason = str(error).strip().splitlines()[0].partition(". ")[0]
        raise CheckpointError(f"{path}: {reason}; pip install {package}") from error
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: no tokenizer could be loaded ({reason}); give a directory with one") from error


def load_tokenizer(path: str, gguf_file: str | None = None) -> PreTrainedTokenizerFast:
    """A pretrained tokenizer with the stream's special tokens added; raises as `open_tokenizer` does."""
    return with_special_tokens(open_tokenizer(path, gguf_file))
