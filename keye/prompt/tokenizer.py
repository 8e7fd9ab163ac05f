"""A tokenizer from nothing: byte-level BPE over given texts, with the special tokens of the stream.

Where a pretrained tokenizer can be had (Qwen3's), its directory or hub id takes this one's place; `with_special_tokens`
adds what it lacks.
"""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from keye.errors import CheckpointError
from keye.prompt.stream import CHAT_TEMPLATE, END_OF_TEXT, IM_END, SPECIAL_TOKENS


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
    """Add the stream's special tokens where they are missing, and name the end and padding tokens."""
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    tokenizer.eos_token, tokenizer.pad_token = IM_END, END_OF_TEXT
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def load_tokenizer(path: str) -> PreTrainedTokenizerFast:
    """A pretrained tokenizer from a directory or hub id, with the special tokens added.

    Raises:
        CheckpointError: nothing loadable there.
    """
    try:
        return with_special_tokens(AutoTokenizer.from_pretrained(path))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: no tokenizer could be loaded ({reason}); give a directory with one") from error
