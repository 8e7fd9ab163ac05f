"""Feature aggregation of SlowFast-LLaVA (arXiv 2407.15841, 2503.18943): frames are encoded once, tokens are pooled.

`SlowFastAggregation` works on features of any model, `keye.aggregation.llava` on LLaVA models of transformers. In
Keye's own model the encoder setting `aggregation` selects it (`keye.aggregation.settings`, `plans`).
"""

from keye.aggregation.blocks import aggregate, block_tokens, make_blocks
from keye.aggregation.pathways import Pooling, SlowFastAggregation, sample_frames, slow_indices
from keye.aggregation.settings import FeatureAggregation

__all__ = [
    "FeatureAggregation",
    "Pooling",
    "SlowFastAggregation",
    "aggregate",
    "block_tokens",
    "make_blocks",
    "sample_frames",
    "slow_indices",
]
