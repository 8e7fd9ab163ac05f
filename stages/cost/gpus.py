"""GPUs that a run can be estimated for: memory, peak rate, bandwidth and price per hour.

Memory, rates and bandwidths are those of the data sheets (dense bf16 products, without sparsity). Prices are
assumptions: about those of clouds for an hour on demand in November 2025. `keye cost --price` sets another one.
"""

from dataclasses import dataclass

from keye.errors import KeyeError

PRICES_OF = "2025-11"  # year and month of the assumed prices


@dataclass(frozen=True)
class Gpu:
    """One device.

    memory: bytes. peak: floating-point operations a second in bf16 matrix products. bandwidth: bytes a second of its
    memory. price: US dollars an hour, an assumption.
    """

    name: str
    memory: float
    peak: float
    bandwidth: float
    price: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40", 40e9, 312e12, 1.56e12, 1.3),
        Gpu("a100", 80e9, 312e12, 2.04e12, 1.8),
        Gpu("h100", 80e9, 989e12, 3.35e12, 3.0),
        Gpu("h200", 141e9, 989e12, 4.8e12, 3.8),
        Gpu("h800", 80e9, 989e12, 3.35e12, 2.6),
        Gpu("b200", 180e9, 2250e12, 8.0e12, 5.5),
        Gpu("l40s", 48e9, 362e12, 0.864e12, 1.0),
        Gpu("4090", 24e9, 165e12, 1.01e12, 0.5),
    )
}


def gpu_named(name: str) -> Gpu:
    """The device with a name such as "h200".

    Raises:
        KeyeError: it is not in the table.
    """
    if name not in GPUS:
        raise KeyeError(f"--gpu {name} is not known; use one of {', '.join(GPUS)}, or add it to stages/cost/gpus.py")
    return GPUS[name]
