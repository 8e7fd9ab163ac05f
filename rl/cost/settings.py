"""The keys of a recipe that its cost depends on."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from rl.recipe import Gspo, RlRecipe


@dataclass(frozen=True)
class Settings:
    """The settings of `[gspo]` under their names, `cache_bytes`: `rollout.cache_mb` in bytes, and `served`.

    served: answers are sampled by other servers (`rollout.engine = "served"`), not by the GPUs of the training.
    """

    steps: int = 1
    prompts: int = 32
    group_size: int = 8
    mini_batches: int = 4
    max_new_tokens: int = 32
    max_prompt_tokens: int = 0
    decode_batch_size: int = 256
    micro_batch_tokens: int = 0
    sequence_parallel: int = 1
    cache_mb: int = 1024
    cache_bytes: int = 8 << 30
    served: bool = False
    freeze: tuple[str, ...] = ()
    kl: float = 0.0
    zero: int = 2
    checkpointing: bool = False
    offload: bool = False
    mlp_tiles: int = 1
    offload_optimizer: bool = False
    lora_rank: int = 0
    precision: str = "auto"

    @property
    def element(self) -> int:
        """Bytes of a value in training on a GPU."""
        return 4 if self.precision == "fp32" else 2


def settings_of(recipe: RlRecipe) -> Settings:
    """The settings of a recipe."""
    given = {name: getattr(recipe.gspo, name) for name in keys()}
    served = recipe.rollout.engine == "served"
    return Settings(**given, cache_bytes=recipe.rollout.cache_mb << 20, served=served)


def keys() -> list[str]:
    """The settings that are keys of `[gspo]`."""
    names = {field.name for field in dataclasses.fields(Gspo)}
    return [field.name for field in dataclasses.fields(Settings) if field.name in names]


def lora_parameters(text: Any, rank: int) -> int:
    """Parameters of LoRA of a rank on all matrices of the decoder's layers."""
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    queries, keys = text.num_attention_heads * head, text.num_key_value_heads * head
    width, wide = text.hidden_size, text.intermediate_size
    sizes = 2 * (width + queries) + 2 * (width + keys) + 3 * (width + wide)  # q and o, k and v, three of the MLP
    return rank * sizes * text.num_hidden_layers
