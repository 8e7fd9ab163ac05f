"""HyperZ·Z·W (arXiv 2401.17948): slow networks that turn coordinates into kernels, and fast layers that apply them.

`HyperZZWNet` is the classifier, as released and in a form for any size; `HyperZZWMixer` replaces the attention of the
vision tower (`vision_config.mixer = "hyperzzw"`); `Kar3` and the losses are those of the paper's code.
"""

from keye.hyperzzw.kar3 import Kar3
from keye.hyperzzw.losses import fast_norms, slow_neural_loss
from keye.hyperzzw.mixer import HyperZZWMixer
from keye.hyperzzw.network import HyperZZWConfig, HyperZZWNet, NetOutput
from keye.hyperzzw.operators import global_product, local_product, twofold_product
from keye.hyperzzw.slow import ContextSlowNet, SlowNet

__all__ = [
    "ContextSlowNet",
    "HyperZZWConfig",
    "HyperZZWMixer",
    "HyperZZWNet",
    "Kar3",
    "NetOutput",
    "SlowNet",
    "fast_norms",
    "global_product",
    "local_product",
    "slow_neural_loss",
    "twofold_product",
]
