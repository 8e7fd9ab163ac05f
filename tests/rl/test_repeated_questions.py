"""A question that is drawn twice in a step gets two different groups of answers, on any number of processes."""

from itertools import chain
from threading import Barrier, Thread
from types import SimpleNamespace

import pytest

from rl.questions.prompts import Prompt, PromptStream
from rl.recipe import Gspo, RlRecipe
from rl.rollout import InProcessRollout
from rl.rollout.engine import ROLLOUT
from rl.trainer import GspoTrainer
from tests.rl.conftest import QUESTIONS

RECIPE = RlRecipe(Gspo(steps=1, learning_rate=1.0, max_new_tokens=6))
DRAWN = 8  # of three questions: a step over three epochs


@pytest.fixture
def questions(tmp_path):
    return [
        Prompt(str(i), "", [{"role": "user", "content": text}], "3", None, (), tmp_path, index=i)
        for i, text in enumerate(QUESTIONS)
    ]


def answers_of(world, questions, model, processor) -> dict[int, list]:
    """Place in the step → (question, its answers), sampled by `world` ranks with one stream each."""
    engine, found = InProcessRollout(model, processor), {}
    barrier, box = Barrier(world), [None] * world

    def rank(number):
        def gather(value):
            box[number] = value
            barrier.wait()
            values = list(box)
            barrier.wait()
            return values

        stream, mine = PromptStream(questions, processor, seed=0), list(range(number, DRAWN, world))
        for count in (5, 3):  # the second draw replaces flat groups of the same step
            own = [place for place in mine if place < count]
            drawn = stream.take(count, own, gather)
            trainer = SimpleNamespace(recipe=RECIPE, step=0, rollout=engine)
            groups = GspoTrainer._sample(trainer, drawn, 4, ROLLOUT)
            for place, (prompt, _), group in zip(own, drawn, groups, strict=True):
                found[len(questions) * 2 * (count == 3) + place] = prompt.id, [c.tolist() for c in group.completions]

    threads = [Thread(target=rank, args=(number,)) for number in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def test_a_question_drawn_twice_in_a_step_is_answered_twice(questions, model, processor):
    one, two = (answers_of(world, questions, model.eval(), processor) for world in (1, 2))
    assert len(one) == DRAWN and len({name for name, _ in one.values()}) == 3
    flat = [tuple(chain.from_iterable(answers)) for _, answers in one.values()]
    assert len(set(flat)) == DRAWN
    assert one == two
