"""A tokenizer from nothing: byte-level BPE over given texts, with the special tokens of the stream.

Where a pretrained tokenizer can be had (Qwen3's), its directory or hub id takes this one's place; `with_special_tokens`
adds what it lacks.
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
    """Add the stream's special tokens where they are missing, and name the end and padding tokens.

    No token that is there changes its id. A turn ends with `<|im_end|>`, padding is `<|endoftext|>` (as in Qwen and
    SmolLM2, which have both, and so that padding is never an end that is learnt). A tokenizer that begins every text
    with a token of its own (Llama's `<s>` or `<|begin_of_text|>`) has it at the head of the chat template, too: its
    decoder has seen no text without; Qwen's and SmolLM2's begin with none.

    Raises:
        CheckpointError: a tokenizer that spells words after a special token differently than alone, so that turns
            could not be told apart.
    """
    begin = _beginning(tokenizer)
    # All at once: what is special already stays so, a plain entry becomes special under its id.
    others = [token for token in tokenizer.all_special_tokens if token not in SPECIAL_TOKENS]
    tokenizer.add_special_tokens({"additional_special_tokens": [*SPECIAL_TOKENS, *others]})
    tokenizer.eos_token, tokenizer.pad_token = IM_END, END_OF_TEXT
    tokenizer.chat_template = ("" if begin is None else "{{- '" + begin + "' -}}") + CHAT_TEMPLATE
    _check_turns(tokenizer)
    return tokenizer


def _beginning(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """The token that this tokenizer puts before every text, None when it puts none."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token if ids and ids[0] == tokenizer.bos_token_id else None


def _check_turns(tokenizer: PreTrainedTokenizerFast) -> None:
    """Labels are found by the ids of "assistant" after `<|im_start|>`: they must be those of the word alone."""
    ids = tokenizer(f"{IM_START}assistant\nYes{IM_END}", add_special_tokens=False)["input_ids"]
    word = tokenizer("assistant\n", add_special_tokens=False)["input_ids"]
    if ids[1 : 1 + len(word)] != word:
        raise CheckpointError(
            f"{tokenizer.name_or_path or 'tokenizer'}: it spells a word after {IM_START} differently than alone (a "
            "SentencePiece tokenizer with a leading space?); use a byte-level one, such as Qwen's or SmolLM2's"
        )


def open_tokenizer(path: str, gguf_file: str | None = None) -> PreTrainedTokenizerFast:
    """A pretrained tokenizer as it is, from a directory, a hub id or a GGUF file in a directory.

    Raises:
        CheckpointError: nothing loadable there, or GGUF without the package that reads it.
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
