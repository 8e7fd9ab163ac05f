"""Every format gives the same samples: one set of chats, written in each, read by number and as a stream."""

import http.server
import io
import json
import tarfile
import threading
from collections import Counter
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from keye.errors import KeyeError, ManifestError
from keye.slowfast.pixels import normalised
from stages.data.items import Cache
from stages.data.quarantine import Quarantine
from stages.data.sources.chat import as_chat
from stages.data.sources.formats import Table
from stages.data.sources.source import Source
from stages.recipe import SourceRecipe
from tests.stages import small

COLOURS = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0), (0, 200, 200)]
ROWS = 10


@pytest.fixture(scope="module")
def processor():
    return small.processor()


def png(number: int) -> bytes:
    """A picture whose pixels all have the value of its number."""
    out = io.BytesIO()
    Image.new("RGB", (56, 56), (number, number, 255 - number)).save(out, "PNG")
    return out.getvalue()


def chat(number: int) -> list[dict]:
    asked = [{"type": "image", "image": f"{number:03}.png"}, {"type": "text", "text": f"colour {number}"}]
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": f"red {number}"}]


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The ten chats as rows.jsonl, rows.json, parquet/{0,1}.parquet and tars/{0,1}.tar, with their pictures."""
    folder = tmp_path_factory.mktemp("formats")
    for number in range(ROWS):
        (folder / f"{number:03}.png").write_bytes(png(number))
    rows = [{"messages": chat(number)} for number in range(ROWS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rows.json").write_text(json.dumps(rows))
    for half in range(2):
        (folder / "parquet").mkdir(exist_ok=True)
        (folder / "tars").mkdir(exist_ok=True)
        mine = range(half * 5, half * 5 + 5)
        table = {
            "picture": [{"bytes": png(number), "path": None} for number in mine],
            "asked": [f"colour {number}" for number in mine],
            "said": [f"red {number}" for number in mine],
        }
        features = datasets.Features(
            {"picture": datasets.Image(), "asked": datasets.Value("string"), "said": datasets.Value("string")}
        )
        datasets.Dataset.from_dict(table, features=features).to_parquet(str(folder / "parquet" / f"{half}.parquet"))
        with tarfile.open(folder / "tars" / f"{half}.tar", "w") as tar:
            for number in mine:
                row = {"messages": chat(number)}
                row["messages"][0]["content"][0]["image"] = "view.png"
                add(tar, f"a/{number:03}.json", json.dumps(row).encode())
                add(tar, f"a/{number:03}.view.png", png(number))
    return folder


COLUMNS = {"image": "picture", "question": "asked", "answer": "said"}
FORMS = {
    "jsonl": ("rows.jsonl", {}),
    "json": ("rows.json", {}),
    "parquet": ("parquet", {"columns": COLUMNS}),
    "webdataset": ("tars/*.tar", {}),
    "hub": ("parquet", {"format": "hub", "columns": COLUMNS}),  # a folder is opened like a data set of the hub
}


def opened(folder: Path, name: str, processor, seed: int = 0, quarantine: Quarantine | None = None, **more) -> Source:
    path, columns = FORMS.get(name, (name, {}))
    path = path if "://" in path else str(folder / path)
    recipe = SourceRecipe(path, more.pop("kind", "image"), **{**columns, **more})
    return Source(recipe, processor, seed, Cache(1 << 22), Quarantine() if quarantine is None else quarantine)


def shown(source: Source, processor, index: int) -> tuple[str, int]:
    """The text of a sample and the number of its picture."""
    sample = source.item(index).sample
    words = processor.decode(sample.labels[sample.labels != -100]).removesuffix("<|im_end|>")
    return words, round(float((normalised(sample.pixel_values)[0, 0, 0, 0] + 1) * 127.5))


EXPECTED = Counter((f"red {number}", number) for number in range(ROWS))


@pytest.mark.parametrize("form", FORMS)
def test_every_format_gives_the_same_samples(folder, processor, form):
    source = opened(folder, form, processor)
    for _ in range(2):
        assert Counter(shown(source, processor, source.draw()) for _ in range(ROWS)) == EXPECTED
    assert len(source.quarantine) == 0


@pytest.mark.parametrize("form", ["jsonl", "parquet", "webdataset", "hub"])
def test_every_stream_gives_the_same_samples_in_every_epoch(folder, processor, form):
    source = opened(folder, form, processor, streaming=True, shuffle=3)
    for _ in range(3):
        assert Counter(shown(source, processor, source.draw()) for _ in range(ROWS)) == EXPECTED
    assert len(source.rows.lanes) == (1 if form == "jsonl" else 2)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_stream_is_the_same_on_any_number_of_ranks(folder, processor, ranks):
    alone = opened(folder, "webdataset", processor, streaming=True, shuffle=3)
    order = [shown(alone, processor, alone.draw()) for _ in range(24)]
    many = [opened(folder, "webdataset", processor, streaming=True, shuffle=3) for _ in range(ranks)]
    together = []
    for _ in range(24):
        (index,) = {source.draw() for source in many}
        together.append(shown(many[many[0].owners(np.array([index]), ranks)[0]], processor, index))
    assert together == order


def test_a_stream_resumes_from_its_state_and_finds_earlier_samples_again(folder, processor):
    whole, begun, resumed = (opened(folder, "parquet", processor, streaming=True, shuffle=4) for _ in range(3))
    order = [shown(whole, processor, whole.draw()) for _ in range(30)]
    for _ in range(13):
        begun.draw()
    resumed.load_state_dict(json.loads(json.dumps(begun.state_dict())))
    assert [shown(resumed, processor, resumed.draw()) for _ in range(10)] == order[13:23]
    resumed.rows.lanes[0]._recent.clear()  # no longer kept
    assert [shown(resumed, processor, index) for index in (4, 25, 3)] == [order[4], order[25], order[3]]


def test_another_seed_is_another_order(folder, processor):
    orders = []
    for seed in range(2):
        source = opened(folder, "webdataset", processor, seed, streaming=True, shuffle=5)
        orders.append([shown(source, processor, source.draw()) for _ in range(ROWS)])
    assert orders[0] != orders[1]


def test_lists_of_pictures_are_counted_without_reading_them(processor, tmp_path):
    rows = {
        "images": [[{"bytes": png(n), "path": None} for n in pair] or None for pair in ((1, 2), (), (3,))],
        "question": ["which", "why", "what"],
        "answer": ["red 1", "red 2", "red 3"],
    }
    features = datasets.Features(
        {"images": datasets.List(datasets.Image()), "question": datasets.Value("string"),
         "answer": datasets.Value("string")}
    )  # fmt: skip
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "rows.parquet"))
    pictures, text = (opened(tmp_path, "rows.parquet", processor, kind=kind) for kind in ("image", "text"))
    assert pictures.rows.indices.tolist() == [0, 2] and text.rows.indices.tolist() == [1]
    assert [len(pictures.item(index).sample.image_grid_thw) for index in (0, 2)] == [2, 1]
    outlines = list(pictures.rows.table.parts[0].outlines())
    assert [row["images"] for row in outlines] == [[b"", b""], None, [b""]]


def test_lines_of_many_files_are_named_by_their_file(folder, processor, tmp_path):
    for number in range(3):
        rows = [{"messages": [{"role": "assistant", "content": f"red {number}"}]}] * 2
        lines = [json.dumps(row) for row in rows]
        lines.insert(number, "{")
        (tmp_path / f"{number}.jsonl").write_text("\n".join(lines))
    source = opened(tmp_path, "*.jsonl", processor, kind="text")
    assert len(source.rows.indices) == 6
    assert source.quarantine.seen == {(str(tmp_path / f"{n}.jsonl"), n + 1) for n in range(3)}


def test_a_stream_names_its_bad_rows_and_serves_the_others(processor, tmp_path):
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        add(tar, "0.json", b'{"messages": [')
        add(tar, "1.txt", b"red 1")
        add(tar, "2.json", b"[]")
    source = opened(tmp_path, "bad.tar", processor, streaming=True, kind="text")
    assert {source.item(source.draw()).caption for _ in range(4)} == {"red 1"}
    assert {line for _, line in source.quarantine.seen} == {1, 3}
    again = opened(tmp_path, "bad.tar", processor, kind="text")
    assert again.rows.indices.tolist() == [1] and {line for _, line in again.quarantine.seen} == {1, 3}


def test_a_lane_without_wanted_rows_is_skipped(processor, tmp_path):
    for name in ("red", "blue"):
        row = {"messages": [{"role": "assistant", "content": name}], "family": name}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    source = opened(tmp_path, "*.jsonl", processor, streaming=True, kind="text", families=("red",))
    items = [source.item(source.draw()) for _ in range(6)]
    # Samples alternate between both lanes, and one has none.
    assert {item is None for item in items[::2]} != {item is None for item in items[1::2]}
    assert sum(item is None for item in items) == 3 and len(source.quarantine) == 0
    with pytest.raises(ManifestError, match="none of its samples can be used"):
        for _ in range(source.rows.patience):
            source.results(np.array([False]))


@pytest.fixture(scope="module")
def address(folder):
    """The folder, served over http."""
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.log_message = lambda *_: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize("streaming", [False, True])
def test_remote_files_are_read_as_local_ones(folder, processor, address, streaming, monkeypatch):
    pytest.importorskip("aiohttp")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # the suite runs offline; this server is local
    for path, more in ((f"{address}/tars/0.tar", {}), (f"{address}/parquet/0.parquet", {"columns": COLUMNS})):
        source = opened(folder, path, processor, streaming=streaming, **more)
        found = {shown(source, processor, source.draw()) for _ in range(10)}
        assert found == {(f"red {number}", number) for number in range(5)}


@pytest.mark.parametrize(
    ("path", "more", "said"),
    [
        ("nowhere/*.parquet", {}, "no such manifest|cannot be listed"),
        ("rows.json", {"streaming": True}, "cannot be streamed; write it as JSONL"),
        ("rows.jsonl", {"format": "parquet"}, "cannot be opened"),
        ("rows.jsonl", {"format": "json"}, "not JSON"),
        ("rows.jsonl", {"format": "webdataset"}, "not a plain tar"),
        ("rows.jsonl", {"kind": "video"}, "no video samples"),
        ("parquet", {"columns": {"image": "photo"}}, "no image samples.*no column photo; the columns are asked"),
        (
            "parquet",
            {"columns": {}},
            r"columns are asked, picture, said; map them in .*columns, as columns = \{question",
        ),
    ],
)
def test_errors_of_reading_name_the_reason(folder, processor, path, more, said):
    with pytest.raises(ManifestError, match=said):
        opened(folder, path, processor, **more)


def test_files_without_rows_and_of_other_formats_are_named(processor, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ManifestError, match="empty.jsonl: has no rows"):
        opened(tmp_path, "empty.jsonl", processor)
    with pytest.raises(ManifestError, match="table.csv: tables of text are not supported; write Parquet or JSONL"):
        opened(tmp_path, "table.csv", processor)


def test_a_folder_without_data_is_named(processor, tmp_path):
    (tmp_path / "notes").mkdir()
    with pytest.raises(ManifestError, match="no data file in this folder"):
        opened(tmp_path, "notes", processor)


def test_a_missing_column_is_named_with_the_existing_ones(folder, processor):
    source = SourceRecipe(str(folder / "parquet"), "image", columns={"image": "photo"})
    with pytest.raises(ManifestError, match="no column photo; the columns are asked, picture, said"):
        Table(source, source.path).find(0)


def test_a_failing_stream_stops_the_run_with_a_message(folder, processor):
    source = opened(folder, "webdataset", processor, streaming=True, shuffle=1)

    class Torn:
        def __iter__(self):
            raise ConnectionError("reset by peer")
            yield

    source.rows.lanes[0].part = Torn()
    with pytest.raises(KeyeError, match="the stream failed .*reset by peer.*repeat the command"):
        source.item(0)


IMAGE = {"type": "image", "image": "a.png"}
TWO = [IMAGE, {"type": "image", "image": "b.png"}]


def words(text: str) -> dict:
    return {"type": "text", "text": text}


@pytest.mark.parametrize(
    ("row", "chat"),
    [
        ({"image": "a.png", "question": "how many", "answer": ["2", "3", "3"]}, [[IMAGE, words("how many")], "3"]),
        (
            {"image": "a.png", "question": "how many", "answer": [{"answer": n} for n in "232"]},
            [[IMAGE, words("how many")], "2"],
        ),
        ({"image": "a.png", "caption": ["a hat", "hats"]}, [[IMAGE, words("Describe the image.")], "a hat"]),
        ({"images": ["a.png", "b.png"], "caption": "hats"}, [[*TWO, words("Describe the images.")], "hats"]),
        (
            {"conversations": [{"from": "human", "value": "<image>\nwhat"}, {"from": "gpt", "value": "hat"}],
             "image": "a.png"},
            [[IMAGE, words("what")], "hat"],
        ),
        (
            {"conversations": [{"from": "human", "value": "see <image> and <image>!"}, {"from": "gpt", "value": "1<2"}],
             "image": ["a.png", "b.png"]},
            [[words("see"), TWO[0], words("and"), TWO[1], words("!")], "1<2"],
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": None}, words("what")]},
                          {"role": "assistant", "content": "hat"}], "images": ["a.png"]},
            [[IMAGE, words("what")], "hat"],
        ),
    ],
)  # fmt: skip
def test_rows_of_other_forms_become_chats(row, chat):
    found = as_chat(row)["messages"]
    assert [message["role"] for message in found] == ["user", "assistant"]
    assert [message["content"] for message in found] == chat


def test_documents_and_texts_are_text_of_the_assistant():
    said = [words("a hat"), IMAGE, words("and a cat")]
    document = {"texts": ["a hat", None, "and a cat"], "images": [None, "a.png", None]}
    assert as_chat(document)["messages"] == [{"role": "assistant", "content": said}]
    assert as_chat({"words": "once"}, {"text": "words"})["messages"] == [{"role": "assistant", "content": "once"}]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"a": 1, "b": 2}, "the columns are a, b; map them in data.sources.columns"),
        ({"conversations": [{"from": "bird", "value": "hi"}]}, "not a list of from and value"),
        ({"conversations": [{"from": "human", "value": "hi"}], "image": "a.png"}, "0 markers .* the row 1 media"),
        ({"image": "a.png", "question": "what", "answer": [3]}, "no 'messages' list in the chat format"),
        ({"image": "a.png", "caption": 3, "messages": 7}, "no 'messages' list in the chat format"),
        ({"texts": 7}, "no 'messages' list in the chat format"),
        ({"texts": ["a"], "images": [None, "b.png"]}, "give the same number"),
    ],
)  # fmt: skip
def test_a_row_in_no_known_form_names_the_error(row, said):
    with pytest.raises(ManifestError, match=said):
        as_chat(row)


def test_pictures_in_the_assistants_text_have_no_labels(processor, folder):
    part = {"type": "image", "image": str(folder / "001.png")}
    said = [{"role": "assistant", "content": [words("a hat"), part, words("a cat")]}]
    sample = processor.sample(said)
    assert processor.decode(sample.labels[sample.labels != -100]) == "a hata cat<|im_end|>"
    assert len(sample.input_ids) > len(processor.sample([{"role": "assistant", "content": "a hata cat"}]).input_ids)
