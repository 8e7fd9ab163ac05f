"""The families of SlowFastBench v1 in one table: what changes, when, for how long, by how much, and what is asked.

Answers come from the *binding* of equal events, never from the events: coloured tags that do not change are assigned to
the places at random, and the places are far from the tags. So all answers of a family have the same distribution of
plans, similarities and packets.
"""

from keye.world.slowfastbench import schedules
from keye.world.slowfastbench.family import Family

FAMILIES: dict[str, Family] = {
    "find": Family(
        "one half second anywhere in a film with cuts", "lamp", schedules.one, (1, 1), (0.16, 0.3),
        ("Which colour marks the lamp that lights up?", "One marked lamp lights up. What is its colour?"),
        group="tags", decoys=1, cuts=3,
    ),
    "coverage": Family(
        "a small event inside a static scene", "lamp", schedules.one, (3, 6), (0.06, 0.1),
        ("Which colour marks the small lamp that lights up?", "A small marked lamp lights up. What is its colour?"),
        group="tags", decoys=1, shortest=16, lowest=240, motions=("still", "grain"),
    ),
    "detail": Family(
        "small text that is shown for a second", "card", schedules.cards, (2, 2), (0.05, 0.08),
        ("What is the {} digit on the card?",), tags=False, places=1, lowest=480,
    ),
    "read": Family(
        "text on several cards", "card", schedules.cards, (2, 4), (0.22, 0.4),
        ("What is the {} digit on the {} card?",), tags=False, places=3, shortest=8,
    ),
    "order": Family(
        "the order of equal events", "lamp", schedules.order, (1, 2), (0.16, 0.3),
        ("Which colour marks the lamp that lights up {}?", "Which lamp lights up {}? Name its colour."),
        group="time", shortest=8,
    ),
    "turn": Family(
        "the direction of a motion", "disc", schedules.turn, (1, 2), (0.16, 0.22),
        ("Which colour marks the disc that goes round {}?", "One disc goes round {}. Which colour marks it?"),
        group="time", members=2, places=2, shortest=8, motions=("still", "grain"),
    ),
    "alias": Family(
        "frames close enough in time to see how far a dial turns", "dial", schedules.spin, (1, 1), (0.2, 0.34),
        ("Which colour marks the dial that turns {} every half second?",), shortest=8, longest=600,
    ),
    "flicker": Family(
        "frames close enough in time to see how fast a lamp blinks", "lamp", schedules.blink, (1, 1), (0.16, 0.3),
        ("Which colour marks the lamp that blinks {}?",), shortest=16, longest=600,
    ),
    "count": Family(
        "every one of ten flashes", "lamp", schedules.count, (1, 1), (0.16, 0.3),
        ("How often does the {} lamp light up?", "Count the flashes of the {} lamp."), shortest=16,
    ),
    "when": Family(
        "the second of an event", "lamp", schedules.when, (1, 2), (0.16, 0.3),
        ("At what second does the {} lamp light up?", "When does the {} lamp light up, in seconds?"), shortest=8,
    ),
    "duration": Family(
        "how long events last", "lamp", schedules.duration, (1, 2), (0.16, 0.3),
        ("Which colour marks the lamp that stays lit {}?",), shortest=32,
    ),
    "together": Family(
        "events at the same time", "lamp", schedules.together, (1, 3), (0.16, 0.3),
        ("Which lamp lights up together with the {} one?", "The {} lamp lights up. Which one lights up with it?"),
    ),
    "compare": Family(
        "states on both sides of a cut", "lamp", schedules.compare, (1, 1), (0.16, 0.3),
        ("Which colour marks the lamp that {} across the cut?",), cuts=1, motions=("still", "grain"),
    ),
    "ground": Family(
        "the place of an event", "lamp", schedules.ground, (1, 3), (0.2, 0.3),
        ("Give the box of the lamp that lights up {}.", "Where is the lamp that lights up {}? Give its box."),
        tags=False, shortest=8,
    ),
}  # fmt: skip
"""Family → its row."""


def _on_real_clips() -> None:
    for name in ("find", "order", "read"):
        row = FAMILIES[name].__dict__ | {"real": True, "motions": ("real",), "cuts": 0, "longest": 60, "shortest": 8}
        FAMILIES[f"real_{name}"] = Family(**row)


_on_real_clips()
