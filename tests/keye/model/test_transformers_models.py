"""Keye's models under transformers' common model tests."""

import copy
import unittest
from typing import Any

import pytest
import torch
from transformers.models.auto import modeling_auto

from keye import KeyeForConditionalGeneration
from keye.model.keye import KeyeModel
from scripts.bench.common.streams import VISION, VOCAB, family_config
from tests.keye.model.transformers_suite import load, outcome

# Messages with which the mixin skips a test by itself, and why that is right here.
REASONS = {
    "test requires": "a GPU or a package (Flash Attention, kernels) that these tests do without",
    "test is slow": "transformers' own slow tests, of compiled training; the layers' test is in test_ecosystem.py",
    "No conversion found": "released names are mapped in from_pretrained, not by transformers' table of conversions",
    "grouped_mm": "no experts",
    "sparse experts": "no experts",
    "output_router_logits": "no experts",
    "not an encoder-decoder": "a decoder alone",
    "_keep_in_fp32_modules": "nothing is kept in fp32 but tables, which are no parameters",
    "no standardized RoPE module": "M-RoPE; test_decoders.py compares it with each decoder's own",
    "does not have partial rope": "the whole head turns",
    "no axial RoPE layer": "the tower's 2-D RoPE is a function; test_vision.py compares it",
    "does not have position embeddings": "none in the decoder; the tower's are read at any size",
    "does not support SDPA": "said of models of one part; Keye is composite",
    "sliding window mask": "no window",
}
# Tests whose premise does not hold for Keye, and why.
LEFT_OUT = {
    "test_generation_tester_mixin_inheritance": "the sdist does not hold the mixin of generation",
    "test_model_rope_scaling_from_config_1_dynamic": "Keye refuses frequencies that change with the length",
    "test_sdpa_can_dispatch_composite_models": "the default is the attention 'keye', and the tower has its own",
}
STILL, CLIP = 6, 7  # neither drawn by a test (0 to 4) nor lost when one makes the vocabulary smaller


def words(shape: tuple[int, ...], vocab_size: int, *_: Any, **__: Any) -> torch.Tensor:
    """Ids other than placeholders and padding; it replaces transformers' `ids_tensor`."""
    return torch.randint(CLIP + 1, vocab_size, tuple(shape))


class KeyeTester:
    """Three rows of text with an image of 4 × 4 patches each, as transformers' mixin requires."""

    batch_size, seq_length, tokens, patches = 3, 11, 4, 16
    is_training = True

    def __init__(self, stills: bool) -> None:
        self.stills = stills
        text = family_config().text_config
        self.num_hidden_layers, self.hidden_size = text.num_hidden_layers, text.hidden_size
        self.num_attention_heads, self.vocab_size = text.num_attention_heads, VOCAB

    def get_config(self) -> Any:
        config = family_config(pad_token_id=0, bos_token_id=1, eos_token_id=2)
        config.image_token_id, config.video_token_id = STILL, CLIP
        return config

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        ids = words((self.batch_size, self.seq_length), VOCAB)
        if not self.stills:
            return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        ids[:, 2 : 2 + self.tokens] = STILL
        grid = torch.tensor([[1, 4, 4]] * self.batch_size)
        return self.get_config(), {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.rand(self.batch_size * self.patches, 3 * 14 * 14),
            "image_grid_thw": grid,
        }


def case(mixin: type) -> type[unittest.TestCase]:
    """transformers' mixin with Keye's classes, as in the tests of a model of transformers."""

    class KeyeModelTest(mixin, unittest.TestCase):
        all_model_classes = (KeyeModel, KeyeForConditionalGeneration)
        _is_composite = True
        test_can_init_all_missing_weights_before_2023 = True  # a year is read from a copyright line, which is not here

        def setUp(self) -> None:
            # This test makes batches of another size out of ids alone, to which pixels would not fit.
            self.model_tester = KeyeTester(stills="test_eager_matches_sdpa" not in self._testMethodName)

        def _prepare_for_class(self, inputs: dict, model_class: type, return_labels: bool = False) -> dict:
            inputs = copy.deepcopy(inputs)
            if return_labels and model_class is KeyeForConditionalGeneration:
                inputs["labels"] = torch.ones_like(inputs["input_ids"])
            return inputs

        def _image_features_prepare_config_and_inputs(self) -> tuple[Any, dict]:
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            return config, {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}

        def _video_features_prepare_config_and_inputs(self) -> tuple[Any, dict]:
            config, inputs = self._image_features_prepare_config_and_inputs()
            return config, {
                "pixel_values_videos": inputs["pixel_values"],
                "video_grid_thw": inputs["image_grid_thw"],
            }

        def _image_features_get_expected_num_hidden_states(self, *_: Any) -> int:
            return VISION["num_hidden_layers"] + 1

        def _image_features_get_expected_num_attentions(self, *_: Any) -> int:
            return VISION["num_hidden_layers"]

        _video_features_get_expected_num_hidden_states = _image_features_get_expected_num_hidden_states
        _video_features_get_expected_num_attentions = _image_features_get_expected_num_attentions

    for name, reason in LEFT_OUT.items():
        setattr(KeyeModelTest, name, unittest.skip(reason)(getattr(KeyeModelTest, name)))
    return KeyeModelTest


@pytest.mark.slow
def test_models(monkeypatch: pytest.MonkeyPatch) -> None:
    common = load("test_modeling_common")
    monkeypatch.setattr(common, "ids_tensor", words)
    # What transformers writes down for its own models; a class registered from outside stands in other tables.
    for table, model_class in (
        ("MODEL_MAPPING_NAMES", KeyeModel),
        ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", KeyeForConditionalGeneration),
    ):
        monkeypatch.setitem(getattr(modeling_auto, table), "KeyeVL1_5", model_class.__name__)
    outcome(case(common.ModelTesterMixin), {**REASONS, **{reason: "" for reason in LEFT_OUT.values()}})
