"""A bad line is counted, written to quarantine.jsonl with file and line, and skipped; the others are served."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from keye.errors import KeyeError, ManifestError
from stages.data.items import Cache, Item
from stages.data.quarantine import Quarantine
from stages.data.sources.chat import caption_of, kind_of
from stages.data.sources.source import Source
from stages.recipe import SourceRecipe
from tests.stages import small


@pytest.fixture(scope="module")
def processor():
    return small.processor()


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    return small.world(tmp_path_factory.mktemp("world"))


def served(source: Source, count: int) -> list[Item]:
    """The next `count` good samples."""
    items: list[Item] = []
    while len(items) < count:
        item = source.item(source.draw())
        source.results(np.array([item is not None]))
        items += [item] if item is not None else []
    return items


def beside(manifest: Path, name: str, rows: list[str]) -> Path:
    """Another manifest in the same folder."""
    path = manifest.with_name(name)
    path.write_text("".join(row + "\n" for row in rows))
    return path


def chat(content: object, answer: str = "red") -> str:
    return json.dumps({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]})


def clip(name: str) -> str:
    return chat([{"type": "video", "video": name}, {"type": "text", "text": "how many flashes"}])


def rows_of(path: Path) -> dict[int, str]:
    """Line → reason."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(set(row) == {"file", "line", "reason"} for row in rows)
    return {row["line"]: row["reason"] for row in rows}


def test_bad_clips_are_quarantined_and_the_others_served(manifest, processor, tmp_path):
    good = [json.dumps(row) for row in small.lines(manifest) if row["family"] == "count"]
    manifest.with_name("notes.mp4").write_text("these are notes, not a film\n" * 40)
    torn = manifest.with_name("torn.mp4")
    torn.write_bytes((manifest.parent / "clips" / "train-count-00000.mp4").read_bytes()[:200])
    rows = [good[0], '{"messages": [', clip("gone.mp4"), good[1], clip("notes.mp4"), clip(torn.name)]
    bad = beside(manifest, "bad.jsonl", rows)
    quarantine = Quarantine(tmp_path / "stage" / "quarantine.jsonl")
    source = small.source(bad, "video", processor, quarantine)
    found = [item.index for item in served(source, 10)]
    assert set(found) == {0, 3} and found.count(0) == found.count(3) == 5
    assert len(quarantine) == 4
    reasons = rows_of(tmp_path / "stage" / "quarantine.jsonl")
    assert set(reasons) == {2, 3, 5, 6}
    assert "not JSON" in reasons[2] and "gone.mp4" in reasons[3] and "notes.mp4" in reasons[5]
    assert {row["file"] for row in quarantine.rows()} == {str(bad)}


@pytest.mark.parametrize(
    "line",
    [
        chat("which colour").replace("{", '{"caption": 3, ', 1),
        "[]",
        "3",
        '"messages"',
        "{}",
        '{"messages": null}',
        '{"messages": "hello"}',
        '{"messages": [3]}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": [{"role": "user", "content": null}]}',
        '{"messages": [{"role": "user", "content": ["hello"]}]}',
        '{"messages": [{"role": "user", "content": [{"text": "hello"}]}]}',
        '{"messages": []}',
        '{"messages": [{"content": "hello"}]}',
        '{"messages": [{"role": "user", "content": "hello"}]}',
        '{"messages": [{"role": "user", "content": [{"type": "text"}]}, {"role": "assistant", "content": "hello"}]}',
        '{"messages": [{"role": 3, "content": "hello"}, {"role": "assistant", "content": ""}]}',
        '{"messages": [{"role": "assistant", "content": [{"type": "text", "text": 3}]}]}',
        '{"messages": [{"role": "user", "content": "<|video_pad|>"}, {"role": "assistant", "content": "hello"}]}',
        '{"messages": [{"role": "user", "content": "\udcff"}, {"role": "assistant", "content": "hello"}]}',
        "nul \x00 byte",
    ],
)
def test_odd_line_never_stops_a_run(manifest, processor, tmp_path, line):
    path = manifest.with_name("odd.jsonl")
    rows = [chat("which colour"), line, chat("which colour", "blue")]
    path.write_bytes("\n".join(rows).encode(errors="surrogateescape"))
    quarantine = Quarantine(tmp_path / "quarantine.jsonl")
    source = small.source(path, "text", processor, quarantine)
    found = {item.index for item in served(source, 6)}
    assert found >= {0, 2}
    # Either the line was odd but good, or it was quarantined.
    assert (1 in found) != (2 in {row["line"] for row in quarantine.rows()})


def test_visual_lines_of_a_wrong_form_are_quarantined(manifest, processor):
    text = {"type": "text", "text": "which colour"}
    rows = [
        chat([{"type": "image"}, text]),
        chat([{"type": "image", "image": 3}, text]),
        chat([{"type": "image", "image": "train.jsonl"}, text]),
        chat([{"type": "image", "image": ""}, text]),
        chat([{"type": "image", "image": "stills/train-image_read-00000.png"}, text]),
    ]
    quarantine = Quarantine()
    source = small.source(beside(manifest, "stills.jsonl", rows), "image", processor, quarantine)
    assert {item.index for item in served(source, 6)} == {4}
    assert {line for _, line in quarantine.seen} == {1, 2, 3, 4}


def test_empty_lines_and_unicode_line_ends_keep_the_count(manifest, processor, tmp_path):
    path = manifest.with_name("lines.jsonl")
    separator = chat("a\u2028b").replace("\\u2028", "\u2028")
    path.write_text("\n".join([chat("first"), "", separator, "{"]), encoding="utf-8")
    quarantine = Quarantine(tmp_path / "quarantine.jsonl")
    source = small.source(path, "text", processor, quarantine)
    assert source.rows.indices.tolist() == [0, 2] and set(rows_of(tmp_path / "quarantine.jsonl")) == {4}


def test_sample_longer_than_the_context_is_quarantined(manifest, processor):
    path = beside(manifest, "long.jsonl", [chat("red " * 200), chat("red")])
    quarantine = Quarantine()
    source = small.source(path, "text", processor, quarantine, limit=64)
    assert {item.index for item in served(source, 3)} == {1} and quarantine.seen == {(str(path), 1)}


@pytest.mark.parametrize("limit", [16, 40, 64])
def test_text_longer_than_the_context_becomes_consecutive_documents(manifest, processor, limit):
    text = " ".join(f"red {number} green" for number in range(60))
    path = beside(manifest, "book.jsonl", [json.dumps({"text": text}), json.dumps({"text": "which colour"})])
    source = small.source(path, "text", processor, limit=limit)
    whole = processor.sample([{"role": "assistant", "content": text}])
    parts = source.items(0)
    assert len(whole) > 4 * limit and [item.part for item in parts] == list(range(len(parts)))
    assert all(item.tokens == limit for item in parts[:-1]) and parts[-1].tokens <= limit
    learned = [item.sample.labels[item.sample.labels != -100] for item in parts]
    assert torch.equal(torch.cat(learned), whole.labels[whole.labels != -100])
    opening = int((whole.labels != -100).nonzero()[0])
    for item in parts:  # each is a separate document with the same opening
        assert torch.equal(item.sample.input_ids[:opening], whole.input_ids[:opening])
        assert torch.equal(item.sample.position_ids, torch.arange(item.tokens).expand(3, -1))
        labels, ids = item.sample.labels, item.sample.input_ids
        assert torch.equal(labels[labels != -100], ids[labels != -100]) and (labels[:opening] == -100).all()
    end = processor.token_id("<|im_end|>")
    assert [int((item.sample.input_ids == end).sum()) for item in parts] == [0] * (len(parts) - 1) + [1]
    assert not source.quarantine.seen and [item.part for item in source.items(1)] == [0]


def test_chat_longer_than_the_context_is_named_and_not_split(manifest, processor):
    path = beside(manifest, "chats.jsonl", [chat("red", "blue " * 200), chat("red")])
    source = small.source(path, "text", processor, limit=64)
    assert source.items(0) == [] and source.quarantine.seen == {(str(path), 1)}
    assert "64" in source.bad[0] and source.bad[0].startswith(f"{path} line 1: ")


def test_source_of_bad_samples_ends_the_run_with_their_reasons(manifest, processor):
    path = beside(manifest, "dead.jsonl", [clip(f"gone-{number}.mp4") for number in range(1200)])
    source = small.source(path, "video", processor)
    with pytest.raises(ManifestError, match=r"dead.jsonl#video: 1000 of its last 1000 .*max_bad_fraction.*gone-\d+"):
        for _ in range(12):
            indices = source.draw_many(100).tolist()
            items = [source.items(index) for index in indices]
            good = np.array([bool(found) for found in items])
            source.results(good, {place: source.bad[index] for place, index in enumerate(indices)})
    # The allowed number of bad samples does not end the run.
    allowed = small.source(path, "video", processor, max_bad_fraction=0.5)
    for _ in range(40):
        allowed.results(np.array([True, False] * 50), {place: "gone" for place in range(1, 100, 2)})
    with pytest.raises(ManifestError, match="501 of its last 1000"):
        allowed.results(np.array([False] * 2), {0: "gone", 1: "gone"})


def test_stream_of_unreadable_rows_ends_the_run(manifest, processor):
    path = beside(manifest, "torn.jsonl", [chat("red")] + ["{"] * 3000)
    source = Source(SourceRecipe(str(path), "text", streaming=True), processor, 0, Cache(0), Quarantine())
    with pytest.raises(KeyeError, match="999 of the last 1000 rows cannot be read.*max_bad_fraction"):
        [source.items(index) for index in range(600)]


def test_incomplete_line_of_the_quarantine_is_skipped_and_every_rank_has_its_file(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    Quarantine(path).add("a.jsonl", 1, "gone")
    with path.open("a") as file:  # two processes wrote concurrently, and one was killed in its line
        file.write('{"file": "a.jsonl", "li{"file": "a.jsonl", "line": 3, "reason": "gone"}\n[1]\n{"file": "a.js')
    again, other = Quarantine(path), Quarantine(path, rank=3)
    assert {row["line"] for row in again.rows()} == {1}
    again.add("a.jsonl", 4, "gone")
    other.add("b.jsonl", 7, "gone")
    assert (tmp_path / "quarantine-3.jsonl").read_text().count("\n") == 1
    assert {(row["file"], row["line"]) for row in Quarantine(path).rows()} == {
        ("a.jsonl", 1), ("a.jsonl", 4), ("b.jsonl", 7)
    }  # fmt: skip


def test_copies_of_a_manifest_are_distinguished_by_rows_and_contents(manifest, processor, tmp_path):
    rows = [chat("red"), chat("blue")]
    copies = []
    for name, lines in {"one": rows, "same": rows, "more": [*rows, chat("red")], "other": rows[::-1]}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text("".join(line + "\n" for line in lines))
        for streaming in (False, True):
            recipe = SourceRecipe(str(tmp_path / name / "rows.jsonl"), "text", streaming=streaming)
            copies.append(Source(recipe, processor, 0, Cache(0), Quarantine()).mark)
    for kept, streamed in (copies[:2], copies[2:4]):
        assert (kept, streamed) == (copies[0], copies[1])
    assert all(mark not in copies[:2] for mark in copies[4:]) and copies[4]["rows"] == 3


def test_a_manifest_of_bad_lines_is_an_error_that_names_the_quarantine(manifest, processor):
    source = small.source(beside(manifest, "none.jsonl", [clip("gone.mp4")] * 3), "video", processor)
    with pytest.raises(ManifestError, match="none of its samples can be used; see quarantine.jsonl"):
        served(source, 1)


def test_missing_or_too_small_manifest_is_named(manifest, processor, tmp_path):
    with pytest.raises(ManifestError, match="nowhere.jsonl: no such manifest"):
        small.source(tmp_path / "nowhere.jsonl", "text", processor)
    with pytest.raises(ManifestError, match="one.jsonl: no image samples; correct"):
        small.source(beside(manifest, "one.jsonl", [chat("red")]), "image", processor)


def test_resumed_run_writes_a_bad_line_once_and_uses_it_when_corrected(manifest, processor, tmp_path):
    path = beside(manifest, "mended.jsonl", [chat("red"), clip("late.mp4"), "{"])
    clips, file = manifest.parent / "clips", tmp_path / "quarantine.jsonl"
    for _ in range(2):
        source = small.source(path, "video", processor, Quarantine(file))
        with pytest.raises(ManifestError):
            served(source, 1)
    assert file.read_text().count("\n") == 2
    manifest.with_name("late.mp4").write_bytes((clips / "train-count-00000.mp4").read_bytes())
    assert served(small.source(path, "video", processor, Quarantine(file)), 1)[0].index == 1


def test_draws_are_the_same_on_every_rank_and_each_sample_has_one_owner(manifest, processor):
    sources = [small.source(manifest, "video", processor) for _ in range(3)]
    draws = [[source.draw() for _ in range(12)] for source in sources]
    assert draws[0] == draws[1] == draws[2]
    epochs = [draws[0][at : at + 4] for at in (0, 4, 8)]
    assert all(sorted(epoch) == sources[0].rows.indices.tolist() for epoch in epochs)
    assert epochs[0] != epochs[1] or epochs[1] != epochs[2]
    owners = [source.owners(sources[0].rows.indices, 3).tolist() for source in sources]
    assert owners[0] == owners[1] == owners[2] == [0, 1, 2, 0]


def test_draws_continue_from_a_state_in_the_middle_of_an_epoch(manifest, processor):
    whole, begun, resumed = (small.source(manifest, "text", processor) for _ in range(3))
    order = [whole.draw() for _ in range(14)]
    assert [begun.draw() for _ in range(6)] == order[:6]
    resumed.load_state_dict(json.loads(json.dumps(begun.state_dict())))
    assert [resumed.draw() for _ in range(8)] == order[6:]


def test_families_select_the_lines(manifest, processor):
    recipe = SourceRecipe(str(manifest), "image", families=("image_read",))
    source = Source(recipe, processor, 0, Cache(0), Quarantine())
    assert {small.lines(manifest)[i]["family"] for i in source.rows.indices} == {"image_read"}
    with pytest.raises(ManifestError, match="no image samples of the families count"):
        Source(SourceRecipe(str(manifest), "image", families=("count",)), processor, 0, Cache(0), Quarantine())


def test_run_folder_is_in_the_path_but_not_in_the_name(manifest, processor):
    recipe = SourceRecipe("{run}/train.jsonl", "text")
    source = Source(recipe, processor, 0, Cache(0), Quarantine(), run=str(manifest.parent))
    assert source.name == "{run}/train.jsonl#text" and served(source, 1)[0].source == source.name


def test_parquet_gives_the_same_samples(manifest, processor, tmp_path):
    datasets = pytest.importorskip("datasets")
    texts = [{"messages": row["messages"]} for row in small.lines(manifest) if row["family"] == "text"]
    datasets.Dataset.from_list(texts).to_parquet(str(tmp_path / "texts.parquet"))
    one, two = small.source(manifest, "text", processor), small.source(tmp_path / "texts.parquet", "text", processor)
    for first, second in zip(served(one, 4), served(two, 4), strict=True):
        assert torch.equal(first.sample.input_ids, second.sample.input_ids)


def test_cache_returns_the_same_pixels_within_its_limit(manifest, processor):
    plain = small.source(manifest, "video", processor)
    plain.cache.limit = 0
    cached = small.source(manifest, "video", processor)
    for one, two in zip(served(plain, 8), served(cached, 8), strict=True):
        assert torch.equal(two.sample.pixel_values_videos, one.sample.pixel_values_videos)
    assert len(cached.cache.entries) == 4 and not plain.cache.entries
    used = cached.cache.used
    tight = small.source(manifest, "video", processor)
    tight.cache.limit = used // 2
    served(tight, 8)
    assert 0 < tight.cache.used <= used // 2


def test_kind_is_the_most_expensive_medium_of_a_chat():
    image, video, text = ({"type": name} for name in ("image", "video", "text"))
    assert kind_of([{"role": "user", "content": [image, text]}]) == "image"
    assert kind_of([{"role": "user", "content": [image]}, {"role": "user", "content": [video]}]) == "video"
    assert kind_of([{"role": "user", "content": "hello"}]) == "text"


def test_caption_is_all_text_of_the_assistant():
    message = [{"type": "text", "text": "a red disc"}]
    chat_ = [{"role": "assistant", "content": message}, {"role": "user", "content": "and"}]
    assert caption_of([*chat_, {"role": "assistant", "content": "a blue one"}]) == "a red disc a blue one"


def test_threads_encode_the_same_as_one_thread(manifest, processor):
    alone, shared = (small.source(manifest, "video", processor) for _ in range(2))
    indices = [alone.draw() for _ in range(8)]
    with ThreadPoolExecutor(4) as threads:
        for one, two in zip(map(alone.item, indices), threads.map(shared.item, indices), strict=True):
            assert torch.equal(one.sample.input_ids, two.sample.input_ids)
            assert torch.equal(one.sample.pixel_values_videos, two.sample.pixel_values_videos)


def test_long_clip_is_thinned_to_the_context(manifest, processor):
    whole = small.source(manifest, "video", processor)
    tight = small.source(manifest, "video", processor, limit=60)
    assert max(item.tokens for item in served(whole, 4)) > 60
    assert max(item.tokens for item in served(tight, 4)) <= 60 and len(tight.quarantine) == 0


def test_rows_of_a_manifest_that_is_now_shorter_are_quarantined(manifest, processor, tmp_path):
    paths = [beside(manifest, name, [chat("which colour")] * 2) for name in ("a_short.jsonl", "b_short.jsonl")]
    quarantine = Quarantine(tmp_path / "quarantine.jsonl")
    source = small.source(manifest.with_name("?_short.jsonl"), "text", processor, quarantine)
    assert source.item(3) is not None and source.item(9) is None
    (row,) = quarantine.rows()
    assert row["line"] == 10 and "row 10 no longer exists; the data set has 4 rows" in row["reason"]
    assert paths[0].exists()
