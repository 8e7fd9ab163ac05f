"""The update of a group on a GPU agrees with separate sequences on the CPU, and its rollout with its scores.

Without a GPU the tests are skipped; `pytest --noconftest` runs them on the CPU, to test the tests.
"""

import copy
from dataclasses import replace

import pytest
import torch

from rl.policy.scoring import score
from rl.rollout import InProcessRollout
from scripts.bench.rl import group_price as price

pytestmark = pytest.mark.cuda
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def case() -> price.Setting:
    """A prompt of 96 tokens and 4 answers of 8."""
    return price.setting(96, 8, 4, 2)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_gradients_of_a_shared_prompt_are_those_of_separate_sequences(case, dtype, bound) -> None:
    exact = replace(case, model=copy.deepcopy(case.model).double())
    expected = price.gradients(exact.model, lambda: price.update_separately(exact))
    model = copy.deepcopy(case.model).to(DEVICE, dtype)
    twin = replace(case, model=model)

    def update() -> None:
        log_probs = score(model, [twin.group]).log_probs.view(case.answers.shape)
        price.loss_of(log_probs, price.ADVANTAGES[: len(case.answers)].to(DEVICE)).backward()

    found = [gradient.cpu().double() for gradient in price.gradients(model, update)]
    assert price.deviation(found, expected) < bound


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_log_probabilities_of_the_rollout_are_those_of_the_update(case, dtype, bound) -> None:
    model = copy.deepcopy(case.model).to(DEVICE, dtype)
    engine = InProcessRollout(model, case.processor, torch.Generator().manual_seed(0), 4)
    engine.ends = frozenset()
    (group,) = engine.generate([case.sample], 4, 1.0, 8)
    with torch.no_grad():
        found = score(model, [group]).log_probs.cpu()
    sampled = torch.cat(group.log_probs)
    assert found.dtype == torch.float32 and len(sampled) == 4 * 8
    assert float((found - sampled).abs().max()) < bound
