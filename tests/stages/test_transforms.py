"""Transforms compared with hand-written chats; the random generator only chooses between correct forms."""

import random
import re

import pytest

from keye.errors import ManifestError, RecipeError
from stages.data.sources.transforms import TRANSFORMS, apply, checked, thousandth
from stages.recipe import load

IMAGE = {"type": "image", "image": "a.png"}
VIDEO = {"type": "video", "video": "a.mp4", "fps": 1}


def words(text: str) -> dict:
    return {"type": "text", "text": text}


def user(*content) -> dict:
    return {"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


ASKED = [user(IMAGE, words("what colour")), assistant("red")]


def changed(row: dict, *names: str, seed: int = 0, others: list[dict] | None = None) -> dict:
    chance = random.Random(seed)
    return apply(names, row, chance, lambda: chance.choice(others or [row]))


def test_caption_first_asks_for_the_caption_before_the_question():
    row = {"messages": ASKED, "caption": "a red hat", "family": "hats"}
    assert changed(row, "caption_first") == {
        **row,
        "messages": [
            user(IMAGE, words("Describe the image.")),
            assistant("a red hat"),
            user("what colour"),
            assistant("red"),
        ],
    }


def test_caption_last_asks_for_the_caption_after_the_answer():
    row = {"messages": [user(VIDEO, words("what colour")), assistant("red")], "caption": "a red hat falls"}
    turns = changed(row, "caption_last")["messages"]
    assert turns == [*row["messages"], user("Describe the video."), assistant("a red hat falls")]


def test_caption_either_is_one_of_both_and_both_occur():
    row = {"messages": ASKED, "caption": "a red hat"}
    both = [changed(row, "caption_first"), changed(row, "caption_last")]
    drawn = [changed(row, "caption_either", seed=seed) for seed in range(20)]
    assert all(one in both for one in drawn) and all(one in drawn for one in both)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": ASKED},
        {"messages": [user(IMAGE, words("Describe the image.")), assistant("a red hat")], "caption": "a red hat"},
        {"messages": [user("what colour"), assistant("red")], "caption": "a red hat"},
    ],
    ids=["no caption", "only the caption", "no media"],
)
def test_captions_do_not_change_rows_without_a_separate_caption(row):
    assert changed(row, "caption_first") == changed(row, "caption_last") == row


OBJECTS = [
    {"label": "hats", "box": [100, 300, 150, 400]},
    {"label": "cat", "box": [0, 0, 400, 400]},
    {"label": "hats", "box": [20, 100, 30, 200]},
]


def test_objects_are_asked_for_by_kind_and_counted():
    row = {"messages": ASKED, "objects": OBJECTS, "size": [400, 400]}
    for seed in range(6):
        turns = changed(row, "objects", seed=seed)["messages"]
        assert turns[:2] == ASKED and len(turns) == 8
        assert "cat" in turns[2]["content"] and turns[3] == assistant("[0, 0, 999, 999]")
        # From top to bottom.
        assert "hats" in turns[4]["content"] and turns[5] == assistant("[[50, 250, 75, 500], [250, 750, 375, 999]]")
        counted = {"cat": "1", "hats": "2"}
        assert turns[7] == assistant(next(n for label, n in counted.items() if label in turns[6]["content"]))


def test_boxes_in_fractions_need_no_size_and_bad_ones_are_named():
    row = {"messages": ASKED, "objects": [{"label": "cat", "box": [0.25, 0, 0.5, 1]}]}
    assert changed(row, "objects")["messages"][3] == assistant("[250, 0, 500, 999]")
    short, outside = {"label": "cat", "box": [1, 2, 3]}, {"label": "cat", "box": [0, 0, 2, 1]}
    for objects in ([{"label": "cat"}], [short], [outside], [3]):
        with pytest.raises(ManifestError, match="not a list of label and box"):
            changed({"messages": ASKED, "objects": objects}, "objects")


def test_thousandths_are_integers_below_a_thousand():
    assert [thousandth(value, 200) for value in (0, 0.05, 100, 199.9, 200)] == [0, 0, 500, 999, 999]


def test_trap_asks_for_an_object_that_only_another_sample_has():
    row = {"messages": ASKED, "objects": OBJECTS, "size": [400, 400]}
    other = {"messages": ASKED, "objects": [{"label": label, "box": [0, 0, 1, 1]} for label in ("dog", "cat")]}
    for seed in range(6):
        turns = changed(row, "trap", seed=seed, others=[other, row])["messages"]
        assert turns[:2] == ASKED and len(turns) == 4
        assert "dog" in turns[2]["content"]
        assert re.fullmatch("(There is|It shows) no dog( in it)?.", turns[3]["content"])
    assert changed(row, "trap", others=[row]) == row


GALLERY = [
    {"messages": [user({"type": "image", "image": f"{n}.png"}, words("Describe the image.")), assistant(f"hat {n}.")]}
    for n in range(40)
]


def gallery(turns: list[dict]) -> tuple[list[str], str]:
    """The images' paths in order and the question; checks that every image follows its number."""
    parts = turns[0]["content"]
    shown = [part["image"] for part in parts if part["type"] == "image"]
    assert [part["text"] for part in parts[:-1:3]] == [f"Image {n}: " for n in range(1, len(shown) + 1)]
    return shown, parts[-1]["text"]


def test_which_image_is_answered_by_the_number_of_the_captions_image():
    sizes = set()
    for seed in range(12):
        turns = changed(GALLERY[seed], "which_image", seed=seed, others=GALLERY)["messages"]
        shown, question = gallery(turns)
        assert f"hat {seed}. " in question and shown[int(turns[1]["content"]) - 1] == f"{seed}.png"
        assert len(set(shown)) == len(shown) and f"{len(shown)} images" in question
        sizes.add(len(shown))
    assert min(sizes) >= 6 and max(sizes) <= 24 and len(sizes) > 3


def test_nth_image_is_described_and_a_missing_one_is_refused():
    refused = 0
    for seed in range(40):
        turns = changed(GALLERY[seed], "nth_image", seed=seed, others=GALLERY)["messages"]
        shown, question = gallery(turns)
        number = int(re.fullmatch(r"Describe image (\d+).", question)[1])
        if number > len(shown):
            refused += 1
            assert turns[1] == assistant(f"There are only {len(shown)} images.")
        else:
            assert shown[number - 1] == f"{seed}.png" and turns[1] == assistant(f"hat {seed}.")
    assert 0 < refused < 20


def test_images_of_one_caption_are_never_shown_together():
    twins = [{**row, "caption": "a hat"} for row in GALLERY[:3]]
    assert changed(twins[0], "which_image", others=twins) == twins[0]
    turns = changed(twins[0], "which_image", others=[*twins, GALLERY[9]])["messages"]
    assert sorted(gallery(turns)[0]) == ["0.png", "9.png"]


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_same_seed_gives_the_same_chat_and_the_row_is_unchanged(name):
    row = {"messages": ASKED, "objects": OBJECTS, "size": [400, 400], "caption": "a hat"}
    before = repr(row)
    assert changed(row, name, seed=3, others=GALLERY) == changed(row, name, seed=3, others=GALLERY)
    assert repr(row) == before


def test_transforms_are_applied_in_order():
    row = {"messages": ASKED, "objects": [OBJECTS[1]], "size": [400, 400], "caption": "a cat"}
    turns = changed(row, "objects", "caption_first")["messages"]
    assert turns[1] == assistant("a cat") and turns[3] == assistant("red") and turns[5] == assistant("[0, 0, 999, 999]")


def test_invalid_transforms_are_reported():
    assert checked(("objects", "trap"), streaming=False) is None
    assert "use caption_first, caption_last" in checked(("caption_frist",), streaming=False)
    assert "remove streaming" in checked(("trap",), streaming=True)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ('transforms = ["tarp"]', r"data.sources\[0\].transforms: 'tarp' is not a transform; use"),
        ('transforms = ["trap"], streaming = true', "remove streaming"),
        ('format = "csv"', r"data.sources\[0\].format must be one of jsonl"),
    ],
)
def test_a_recipe_names_invalid_settings_of_a_source(tmp_path, more, message):
    path = tmp_path / "mine.toml"
    source = f'name = "mine"\ndata = {{ sources = [{{ path = "a.jsonl", kind = "image", {more} }}] }}\n'
    path.write_text(source + "[multitask]\nsteps = 1\nlr = 1e-3\n")
    with pytest.raises(RecipeError, match=message):
        load(path)
