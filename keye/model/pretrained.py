"""The common base of Keye's Hugging Face models: loading, and the choice of attention."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from keye.checkpoint import released_layout as names
from keye.hyperzzw.mixer import HyperZZWMixer
from keye.hyperzzw.slow import SlowNet
from keye.model.config import KeyeConfig
from keye.model.vision import PositionTable, position_std
from keye.motion.pathway import MotionOutput, TimedConv


class KeyePreTrainedModel(PreTrainedModel):
    """The base of `KeyeModel` and `KeyeForConditionalGeneration`."""

    config_class = KeyeConfig
    config: KeyeConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _no_split_modules = ["VisionLayer"]  # the decoder adds its own
    _keys_to_ignore_on_load_unexpected = names.UNUSED_PATTERNS

    def __init__(self, config: KeyeConfig) -> None:
        text = config.text_config._attn_implementation
        if config._attn_implementation is None:
            config._attn_implementation = {"": "keye", "text_config": text or "keye"}
        elif text is None:
            config.text_config._attn_implementation = config._attn_implementation
        super().__init__(config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As transformers does, with a larger position table (`keye.model.vision.POSITION_SHARE`)."""
        super()._init_weights(module)
        if isinstance(module, PositionTable):
            usual = getattr(self.config.get_text_config(), "initializer_range", 0.02)
            std = position_std(usual, self.config.vision_config.patch_size)
            init.normal_(module.weight, std=std)
        elif isinstance(module, SlowNet):
            for name, value in module.initial().items():
                init.copy_(getattr(module, name), value)
        elif isinstance(module, TimedConv):
            module.initialize(init.normal_)
        elif isinstance(module, MotionOutput):
            init.zeros_(module.weight)
        elif isinstance(module, HyperZZWMixer):
            init.ones_(module.branch_scale)
            init.zeros_(module.branch_shift)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Like transformers'; directories with the released names load as well, and are saved with our names."""
        loaded = super().from_pretrained(*args, **{"key_mapping": names.KEY_MAPPING, **kwargs})
        (loaded[0] if isinstance(loaded, tuple) else loaded)._weight_conversions = []
        return loaded

    def set_attn_implementation(self, attn_implementation: str | dict[str, Any], **kwargs: Any) -> None:
        """Choose the decoder's attention; only "keye", the default, supports packed rows.

        The tower always uses `keye.model.attention` (`config.attention`).
        """
        name = attn_implementation if isinstance(attn_implementation, str) else None
        chosen = {"": name, "text_config": name} if name else attn_implementation
        super().set_attn_implementation(chosen, **kwargs)
        if name:  # the tower is not a PreTrainedModel; transformers would warn about it
            self.config.vision_config._attn_implementation_internal = name

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.embed_tokens = value
