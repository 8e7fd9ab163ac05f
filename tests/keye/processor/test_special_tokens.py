"""Special tokens added to the tokenizers of the families: ids do not change, turns start and end correctly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from keye.errors import CheckpointError
from keye.processor.stream import SPECIAL_TOKENS, Stream
from keye.processor.tokenizer import load_tokenizer, with_special_tokens

WORDS = ["the quick brown fox jumps over the lazy dog assistant user 0123456789\n"] * 4


def byte_level(special: list[str], bos: str | None = None, eos: str | None = None, begins: bool = False):
    """A byte-level BPE as Qwen's, SmolLM2's (special tokens without a beginning) or Llama 3's (`begins`) are built."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)


FAMILIES = {
    "qwen": (["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|box_start|>"], None, "<|im_end|>", False),
    "smollm2": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_start|>", "<|im_end|>", False),
    "llama3": (["<|begin_of_text|>", "<|eot_id|>"], "<|begin_of_text|>", "<|eot_id|>", True),
    "llama2": (["<unk>", "<s>", "</s>"], "<s>", "</s>", True),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_no_token_changes_its_id_and_turns_start_as_in_the_decoders_training(family: str) -> None:
    plain, made = byte_level(*FAMILIES[family]), with_special_tokens(byte_level(*FAMILIES[family]))
    before, after = plain.get_vocab(), made.get_vocab()
    assert before == {token: after[token] for token in before}
    new = sorted(after[token] for token in SPECIAL_TOKENS if token not in before)
    assert new == list(range(len(before), len(before) + len(new)))
    assert made.convert_ids_to_tokens([made.eos_token_id, made.pad_token_id]) == ["<|im_end|>", "<|endoftext|>"]
    assert set(plain.all_special_tokens) <= set(made.all_special_tokens) | {made.eos_token}

    text = made.apply_chat_template([{"role": "user", "content": "the fox"}], tokenize=False)
    begins = FAMILIES[family][1] if FAMILIES[family][3] else ""
    assert text == f"{begins}<|im_start|>user\nthe fox<|im_end|>\n"
    ids = made(text, add_special_tokens=False)["input_ids"]
    assert ids[: 1 + bool(begins)] == [after[token] for token in (begins, "<|im_start|>") if token]


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
def test_words_keep_their_ids(words: str) -> None:
    if any(token in words for token in SPECIAL_TOKENS):
        return
    for plain, made in _pairs():
        assert made(words)["input_ids"] == plain(words)["input_ids"]


def _pairs(kept: list = []):  # noqa: B006  # built once
    if not kept:
        for family in FAMILIES.values():
            kept.append((byte_level(*family), with_special_tokens(byte_level(*family))))
    return kept


def test_a_plain_word_of_that_name_becomes_special_under_its_id() -> None:
    plain = byte_level([])
    plain.add_tokens(["<|im_end|>"])
    where = plain.get_vocab()["<|im_end|>"]
    made = with_special_tokens(plain)
    assert made.get_vocab()["<|im_end|>"] == where == made.eos_token_id
    assert made.decode([where], skip_special_tokens=True) == ""


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_it_is_the_same_and_its_answers_are_learnt(family: str, tmp_path) -> None:
    made = with_special_tokens(byte_level(*FAMILIES[family]))
    made.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert again.get_vocab() == made.get_vocab() and again.chat_template == made.chat_template
    turns = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "jumps over"}]
    ids = torch.tensor(again(again.apply_chat_template(turns, tokenize=False), add_special_tokens=False)["input_ids"])
    special = {token: again.get_vocab()[token] for token in SPECIAL_TOKENS}
    labels = Stream(lambda text: again(text, add_special_tokens=False)["input_ids"], special).labels(ids)
    assert again.decode(labels[labels != -100]) == "jumps over<|im_end|>"


def test_a_tokenizer_that_spells_turns_differently_is_refused() -> None:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.train_from_iterator(WORDS, trainers.BpeTrainer(vocab_size=80, special_tokens=["<unk>"]))
    with pytest.raises(CheckpointError, match="differ from its own"):
        with_special_tokens(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


def test_a_missing_tokenizer_is_named(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="no tokenizer could be loaded"):
        load_tokenizer(str(tmp_path))
