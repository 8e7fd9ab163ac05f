"""KeyeConfig: a vision tower, a projector and a decoder, with presets from two CPU cores to the released 8B."""

import copy
import importlib
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, Qwen3Config

from keye.checkpoint import released_layout as names
from keye.errors import KeyeError


class KeyeVisionConfig(PreTrainedConfig):
    """The native-resolution vision tower; defaults are SigLIP-so400m-patch14-384 (the released tower).

    `position_grid` is the side of the learned position table in patches. `rotary` enables the 2-D RoPE; it is False
    only to compare with plain SigLIP. `mixer` is what mixes the patches of a frame in each layer: "attention" or
    "hyperzzw" (`keye.hyperzzw.HyperZZWMixer`), which has no heads and no rotary. `motion` are the settings of a motion
    pathway (`keye.motion.settings.MotionSettings`); None for a tower without one.
    """

    model_type = "keye_vision"
    base_config_key = "vision_config"

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    patch_size: int = 14
    position_grid: int = 27
    layer_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rotary: bool = True
    mixer: str = "attention"
    motion: dict[str, Any] | None = None


class KeyeConfig(PreTrainedConfig):
    """Configuration of `KeyeForConditionalGeneration`.

    `text_config` is the config of a transformers decoder (`keye.model.decoder`; Qwen3 by default). The ids are those of
    the placeholders that visual features replace. `tie_word_embeddings` defaults to the decoder's. `attention` names
    the kernel of packed attention, in the tower and in packed rows of the decoder: "auto" or one of
    `keye.model.attention.BACKENDS`.
    """

    model_type = "KeyeVL1_5"
    sub_configs = {"vision_config": KeyeVisionConfig, "text_config": AutoConfig}
    # Tools that look for a class in transformers' own namespace, as TRL does, use this if they find none. It is a class
    # attribute and therefore not saved: without `import keye` it does not load the model.
    auto_map = {
        "AutoConfig": "keye.model.config.KeyeConfig",
        "AutoModel": "keye.model.keye.KeyeModel",
        "AutoModelForImageTextToText": "keye.model.keye.KeyeForConditionalGeneration",
        "AutoModelForMultimodalLM": "keye.model.keye.KeyeForConditionalGeneration",
    }

    vision_config: Any = None
    text_config: Any = None
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    tie_word_embeddings: bool | None = None
    attention: str = "auto"

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.vision_config, PreTrainedConfig):
            self.vision_config = KeyeVisionConfig(**(self.vision_config or {}))
        if isinstance(self.text_config, PreTrainedConfig):
            # Another model may use it, whose attention must not change with this one's.
            self.text_config = copy.deepcopy(self.text_config)
        else:
            values = dict(self.text_config or PRESETS["keye_8b"]["text"])
            self.text_config = AutoConfig.for_model(values.pop("model_type", "qwen3"), **values)
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        self.text_config.tie_word_embeddings = self.tie_word_embeddings
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "KeyeConfig":
        """A config.json as this project or the release writes it (flat fields, `keye.checkpoint.released_layout`)."""
        if names.is_released(config_dict):
            config_dict = names.config_from_released(config_dict)
        importlib.import_module("keye.model.keye")  # registers the model's class for the Auto classes
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def preset(cls, name: str, vision: dict[str, Any] | None = None, **text: Any) -> "KeyeConfig":
        """A known size: "tiny" (two CPU cores, minutes), "small" (one GPU), "keye_8b" (the released shapes).

        `vision` overrides fields of the tower's config, `text` those of the decoder's, for example `vocab_size`.

        Raises:
            KeyeError: an unknown name.
        """
        if name not in PRESETS:
            raise KeyeError(f"unknown model preset {name!r}: use one of {', '.join(PRESETS)}")
        sizes = PRESETS[name]
        text_config = Qwen3Config(**{**sizes["text"], **text})
        return cls(vision_config=KeyeVisionConfig(**{**sizes["vision"], **(vision or {})}), text_config=text_config)


def _qwen3(
    hidden: int, layers: int, heads: int, kv_heads: int, head_dim: int, mlp: int, tie: bool, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": mlp,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "use_sliding_window": False,
        "tie_word_embeddings": tie,
        **more,
    }


# At width 128, transformers' initializer_range of 0.02 learns ten times slower than width ** -0.5.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": {
        "vision": {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4},
        "text": _qwen3(
            128, 4, 4, 2, 32, 384, tie=True, vocab_size=2048, max_position_embeddings=16_384, initializer_range=0.08
        ),
    },
    "small": {
        "vision": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6},
        "text": _qwen3(768, 16, 12, 4, 64, 2304, vocab_size=151_936, max_position_embeddings=32_768, tie=True),
    },
    "keye_8b": {
        "vision": {},
        "text": _qwen3(4096, 36, 32, 8, 128, 12_288, vocab_size=151_936, max_position_embeddings=131_072, tie=False),
    },
}

AutoConfig.register("keye_vision", KeyeVisionConfig)
AutoConfig.register("KeyeVL1_5", KeyeConfig)
