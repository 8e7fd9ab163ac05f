"""Training over torch's own varlen operators, whose kernels need a GPU: here plain attention computes them on a CPU.

All else is what runs on a GPU: torch's checks, the operators in the graphs of the compiler with their shapes and
gradients, and what recomputation keeps of them.
"""

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention import varlen

from keye.model import attention, backends
from keye.model.segments import Segments
from stages.data.collate import pack
from stages.distributed.activation_memory import apply_memory_options
from tests.stages import small
from tests.stages.test_compile import model
from tests.stages.test_memory import learn, row, same

CALLS: Counter[str] = Counter()


def given(operator: object, values: tuple[object, ...]) -> dict[str, object]:
    """The arguments of an operator by name; they differ between releases of torch."""
    return dict(zip((argument.name for argument in operator._schema.arguments), values, strict=False))


def plain(q: Tensor, k: Tensor, v: Tensor, call: dict[str, object]) -> Tensor:
    lengths = call["cu_seq_q"].diff()
    assert call["cu_seq_q"].dtype == torch.int32 and call["max_q"] == call["max_k"] >= int(lengths.max())
    return backends.plain(q, k, v, Segments.of_lengths(tuple(lengths.tolist())), call["is_causal"], call["scale"])


def forward(*values: object) -> tuple[Tensor, Tensor, Tensor]:
    call = given(torch.ops.torch_attn._varlen_attn.default, values)
    CALLS["forward"] += 1
    q = call["query"]
    out = plain(q, call["key"], call["value"], call)
    return out.contiguous(), torch.zeros(q.shape[1], q.shape[0]), torch.zeros(2, dtype=torch.uint64)


def backward(*values: object) -> tuple[Tensor, ...]:
    call = given(torch.ops.torch_attn._varlen_attn_backward.default, values)
    CALLS["backward"] += 1
    _, vjp = torch.func.vjp(lambda *x: plain(*x, call), call["query"], call["key"], call["value"])
    return tuple(x.contiguous().clone() for x in vjp(call["grad_out"]))


@pytest.fixture(scope="module")
def kernels() -> None:
    varlen._varlen_attn.register_kernel("cpu")(forward)
    varlen._varlen_attn_backward.register_kernel("cpu")(backward)


@pytest.fixture
def chosen(kernels: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Attention runs on torch's operator."""
    monkeypatch.setattr(attention, "choose", lambda *kind: "torch")
    monkeypatch.setattr(backends, "_functions", {"torch": varlen.varlen_attn})
    for cache in (torch._dynamo.reset, counters.clear, CALLS.clear):
        cache()
    yield
    torch._dynamo.reset()  # graphs of this choice


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Tensor]]:
    return [row(), pack([small.text_sample(23)], 1)]


@pytest.fixture(scope="module")
def expected(rows: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Losses and gradients over the default backend of a CPU."""
    return [learn(model(2), inputs) for inputs in rows]


@pytest.mark.parametrize(
    ("settings", "recomputed", "compiled"),
    [
        ((False,), "none", False),
        ((True,), "tower", False),
        ((True, True), "all", False),
        ((True, False, 3), "tower", False),
        ((True,), "tower", True),
        pytest.param((False,), "none", True, marks=pytest.mark.slow),
        pytest.param((True, True), "all", True, marks=pytest.mark.slow),
        pytest.param((True, False, 3), "tower", True, marks=pytest.mark.slow),
    ],
)
def test_training_over_torchs_operator_has_the_losses_and_gradients_of_the_default(
    chosen: None, rows, expected, settings, recomputed, compiled
) -> None:
    made = model(2)
    apply_memory_options(made, *settings, compiled=compiled, backend="aot_eager")
    for inputs, wanted in zip(rows, expected, strict=True):
        made.zero_grad(set_to_none=True)
        same(learn(made, inputs), wanted)
    layers = 2 * len(rows)  # of the decoder; as many of the tower, which also runs over packs without frames
    assert CALLS["backward"] == 2 * layers
    # A recomputed layer of the decoder keeps its attention, unless its inputs are in host memory or it is compiled.
    again = {"none": 0, "tower": 2 * layers if compiled else layers, "all": 2 * layers}[recomputed]
    assert CALLS["forward"] == 2 * layers + again
    assert not counters["graph_break"]
