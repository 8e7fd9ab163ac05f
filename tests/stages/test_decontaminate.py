"""Pictures of an evaluation are recognized in any encoding, and no other picture is mistaken for one of them."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance
from skimage import data as photographs

from keye.errors import ManifestError
from keye.processor.processor import Sample
from stages.data.items import Cache
from stages.data.quarantine import Quarantine
from stages.data.sources.decontaminate import Near, open_decontamination, perceptual_hash, sample_hashes
from stages.data.sources.source import Source
from stages.recipe import SourceRecipe
from tests.stages import small

NAMES = ("astronaut", "coffee", "chelsea", "camera", "rocket", "page", "brick", "grass", "coins", "moon", "text")


def photograph(name: str) -> Image.Image:
    return Image.fromarray(getattr(photographs, name)()).convert("RGB")


def stored(picture: Image.Image, quality: int) -> Image.Image:
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=quality)
    return Image.open(out)


def hashed(picture: Image.Image) -> np.uint64:
    value = perceptual_hash(torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1)
    assert value is not None
    return value


CHANGES = {
    "stored at quality 20": lambda picture: stored(picture, 20),
    "a third of the size": lambda picture: picture.resize((picture.width // 3, picture.height // 3)),
    "another shape": lambda picture: picture.resize((140, 84)),
    "lighter": lambda picture: ImageEnhance.Brightness(picture).enhance(1.25),
    "darker": lambda picture: ImageEnhance.Brightness(picture).enhance(0.6),
    "less contrast": lambda picture: ImageEnhance.Contrast(picture).enhance(0.6),
    "grey": lambda picture: picture.convert("L").convert("RGB"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_photograph_is_recognized_and_no_other_mistaken_for_it(change):
    hashes = np.array([hashed(photograph(name)) for name in NAMES])
    near = Near(hashes, 6)
    for place, name in enumerate(NAMES):
        found = near.find(hashed(CHANGES[change](photograph(name))))
        assert found is not None and found[0] == place


def test_photographs_differ_in_many_bits():
    hashes = [hashed(photograph(name)) for name in NAMES]
    apart = [int(np.bitwise_count(a ^ b)) for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(apart) > 16


def test_hash_agrees_with_the_cosine_transform_written_out():
    torch.manual_seed(0)
    picture = torch.rand(1, 32, 32).expand(3, -1, -1) * 2 - 1
    n = np.arange(32)
    waves = np.cos(np.pi * (2 * n[None] + 1) * n[:, None] / 64) * np.where(n == 0, np.sqrt(0.5), 1)[:, None]
    spectrum = waves @ picture[0].numpy().astype(np.float64) @ waves.T
    order = sorted(((u, v) for u in range(32) for v in range(32)), key=lambda at: (at[0] + at[1], at))[1:65]
    values = np.array([spectrum[at] for at in order])
    bits = values > np.median(values)
    assert int(perceptual_hash(picture)) == sum(1 << place for place, bit in enumerate(bits) if bit)


def test_uniform_pictures_match_nothing():
    for colour in (-1.0, 0.2, 1.0):
        assert perceptual_hash(torch.full((3, 40, 60), colour)) is None


def test_bytes_have_the_hash_of_their_floats():
    """Noise of one step of 255 has no hash, also for a picture of bytes."""
    grid, noise = torch.tensor([[1, 2, 4]]), torch.randint(100, 102, (8, 3, 14, 14), dtype=torch.uint8)
    coarse = torch.linspace(0, 255, 8).to(torch.uint8)[:, None, None, None].expand(8, 3, 14, 14)
    for codes in (noise, coarse):
        pair = [
            Sample(torch.zeros(1), torch.zeros(1), torch.zeros(3, 1), pixel_values=pixels, image_grid_thw=grid)
            for pixels in (codes, codes.float() / 127.5 - 1)
        ]
        first, second = map(sample_hashes, pair)
        assert first == second and bool(first) == (codes is coarse)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=30),
    st.integers(0, 10),
    st.lists(st.integers(0, 63), max_size=10, unique=True),
)
def test_near_equals_a_comparison_with_all(hashes, bits, flipped):
    value = hashes[0] ^ sum(1 << bit for bit in flipped)
    distances = [(one ^ value).bit_count() for one in hashes]
    expected = (distances.index(min(distances)), min(distances)) if min(distances) <= bits else None
    assert Near(np.array(hashes, dtype=np.uint64), bits).find(np.uint64(value)) == expected


def manifest(folder: Path, name: str, pictures: list[str]) -> Path:
    path = folder / name
    rows = []
    for picture in pictures:
        asked = [{"type": "image", "image": picture}, {"type": "text", "text": "what"}]
        rows.append({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "red"}]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_training_samples_that_show_an_evaluations_picture_are_quarantined(tmp_path):
    processor = small.processor()
    for name in NAMES[:4]:
        photograph(name).save(tmp_path / f"{name}.png")
    stored(photograph("coffee").resize((300, 200)), 30).save(tmp_path / "again.jpg")
    held = manifest(tmp_path, "held.jsonl", ["astronaut.png", "gone.png", "coffee.png"])
    train = manifest(tmp_path, "train.jsonl", ["chelsea.png", "again.jpg", "camera.png"])
    guard = open_decontamination((str(held),), 6, processor)
    quarantine = Quarantine(tmp_path / "quarantine.jsonl")
    source = Source(SourceRecipe(str(train), "image"), processor, 0, Cache(0), quarantine, guard=guard)
    assert [source.item(index) is None for index in range(3)] == [False, True, False]
    (row,) = quarantine.rows()
    assert row["line"] == 2
    assert row["reason"].startswith(f"its image 1 is similar to image 1 of {held} line 3, kept for")


def test_clips_are_recognized_by_their_frames(tmp_path):
    made_for = small.processor()
    path = small.world(tmp_path)
    rows = [row for row in small.lines(path) if row["family"] == "count"]
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps(rows[2]) + "\n")
    guard = open_decontamination((str(held),), 0, made_for)
    source = Source(SourceRecipe(str(path), "video"), made_for, 0, Cache(0), Quarantine(), guard=guard)
    bad = [index for index in source.rows.indices.tolist() if source.item(index) is None]
    clip = rows[2]["messages"][0]["content"][0]["video"]
    assert bad == [i for i, row in enumerate(small.lines(path)) if clip in json.dumps(row)]


def test_without_a_manifest_there_is_no_filter_and_one_without_pictures_is_named(tmp_path):
    made_for = small.processor()
    assert open_decontamination((), 6, made_for) is None
    path = tmp_path / "words.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "what"}]}) + "\n")
    with pytest.raises(ManifestError, match="words.jsonl: it has no picture"):
        open_decontamination((str(path),), 6, made_for)
    with pytest.raises(ManifestError, match="no such manifest"):
        open_decontamination((str(tmp_path / "gone.jsonl"),), 6, made_for)
