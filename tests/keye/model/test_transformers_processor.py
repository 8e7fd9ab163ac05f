"""Keye's processor under transformers' common processor tests."""

import unittest
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from keye import KeyeProcessor, SlowFastEncoder
from keye.processor.tokenizer import train_tokenizer
from tests.keye.model.transformers_suite import load, outcome
from tests.keye.video.make import numbered, write_video

# Messages with which the mixin skips a test, and why that is correct for Keye.
REASONS = {
    "attribute not present": "the slow-fast encoder reads images and videos; it is not an image or video processor",
    "test requires librosa": "no sound",
    "test requires Torchcodec": "clips are decoded with PyAV; test_chat_with_videos below checks the same",
    "does not support tools": "no tools in Keye's chat template",
    "_get_num_multimodal_tokens": "a hook of vLLM; Keye's tokens depend on what a clip shows, not on its size alone",
    "doesn't accept videos at input": "frame rates and counts are in test_processor.py and test_messages.py",
}
# Tests of the complete processor that the mixin runs only for a processor that consists of transformers' parts.
WHOLE = (
    "test_apply_chat_template_image",
    "test_chat_with_",
    "test_processor_text_has_no_visual",
    "test_processor_with_multiple_inputs",
    "test_overlapping_text_image_kwargs_handling",
)
LIMITS = {"min_tokens_per_frame": 4, "max_tokens_per_frame": 16, "max_tokens": 64}


class Declared(KeyeProcessor):
    """Declares the parts that the mixin looks for."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["tokenizer", "image_processor", "video_processor"]


def ids_by_default(processor: KeyeProcessor) -> KeyeProcessor:
    """The processor with transformers' default of `return_dict`; Keye's is True, as in transformers' tokenizers."""
    plain = processor.apply_chat_template
    processor.apply_chat_template = lambda *args, **options: plain(*args, **{"return_dict": False, **options})
    return processor


def media(folder: Path) -> dict[str, list[str]]:
    """Two images and two clips in place of those that transformers' tests download."""
    stills = [folder / f"{name}.png" for name in "ab"]
    for path, colour in zip(stills, ((200, 40, 40), (40, 40, 200)), strict=True):
        Image.new("RGB", (64, 48), colour).save(path)
    clips = [write_video(folder / f"{name}.mp4", numbered(count)) for name, count in (("a", 50), ("b", 75))]
    return {"images": [str(path) for path in stills], "videos": [str(path) for path in clips], "audio": []}


def case(common: ModuleType) -> type[unittest.TestCase]:
    """transformers' mixin with Keye's processor, as in the tests of a model of transformers."""

    class KeyeProcessorTest(common.ProcessorTesterMixin, unittest.TestCase):
        processor_class = KeyeProcessor

        @classmethod
        def _setup_tokenizer(cls) -> Any:
            return train_tokenizer(["user assistant system lower newer upper older longer string"] * 3, 400)

        @staticmethod
        def prepare_processor_dict() -> dict[str, Any]:
            return {"encoder": SlowFastEncoder(**LIMITS).settings, "image": {"min_tokens": 4, "max_tokens": 16}}

        def setUp(self) -> None:
            # Some tests of the complete processor require the names of an image and a video processor. Keye's encoder
            # is neither, so the class declares the names and the processor is made without these parts.
            name = self._testMethodName
            self.processor_class = Declared if name.startswith(WHOLE) else KeyeProcessor

        def get_processor(self, use_tiny_ckpt: bool = True) -> KeyeProcessor:
            processor = KeyeProcessor.from_pretrained(self.tmpdirname)
            if self.processor_class is Declared:
                processor.image_processor = processor.video_processor = None
            return ids_by_default(processor)

        # Overridden because the mixin's versions need torchcodec; Keye decodes with PyAV.
        def test_chat_with_decoded_video(self) -> None:
            data = [np.array(self.prepare_videos_inputs())]
            self._test_apply_chat_template("video", 1, "pt", "videos_input_name", "video_processor", data)

        def test_chat_with_videos(self) -> None:
            for rows in (1, 2):
                data = common.MODALITY_INPUT_DATA["videos"]
                self._test_apply_chat_template("video", rows, "pt", "videos_input_name", "video_processor", data)

    return KeyeProcessorTest


@pytest.mark.slow
def test_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common = load("test_processing_common")
    monkeypatch.setattr(common, "MODALITY_INPUT_DATA", media(tmp_path))
    monkeypatch.setattr(common, "url_to_local_path", lambda url: common.MODALITY_INPUT_DATA["images"][0])
    outcome(case(common), REASONS)
