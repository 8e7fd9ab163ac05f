"""Tars of samples: names, contents and the stored index."""

import io
import json
import os
import tarfile

import datasets
import numpy as np
from PIL import Image

from stages.data.sources.tars import Tar, split_name, stream_tars
from tests.stages import small


def test_names_in_tars_are_cut_at_the_first_dot_of_the_file():
    assert split_name("a.b/000.0.JPG") == ("a.b/000", "0.JPG")
    assert split_name("000") == ("000", "")


def test_files_of_a_tar_keep_the_case_of_their_names(tmp_path):
    chat = {"messages": [
        {"role": "user", "content": [{"type": "image", "image": "Front.JPG"}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": "red"},
    ]}  # fmt: skip
    picture = io.BytesIO()
    Image.new("RGB", (56, 56), "red").save(picture, "JPEG")
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in (("7.Front.JPG", picture.getvalue()), ("7.JSON", json.dumps(chat).encode())):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    (row,) = (row["members"] for row in stream_tars([str(path)]))
    assert set(row) == {"Front.JPG", "JSON"}
    source = small.source(path, "image", small.processor())
    assert source.item(0).sample.pixel_values is not None and not len(source.quarantine)


def test_index_of_a_tar_is_mapped_and_gives_its_contents(tmp_path, monkeypatch):
    parts = ("txt", "json", "0.PNG")
    content = {f"{i}.{name}": f"{i}{name}".encode() * (i + 1) for i in range(5) for name in parts[i % 3 :]}
    path = tmp_path / "a.tar"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with tarfile.open(path, "w") as tar:
        for name, data in content.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))

    for size in (None, 0, 40):  # of the stored index: not yet written, empty, cut
        for index in (tmp_path / "cache/keye").glob("tar-*.index"):
            os.truncate(index, size)
        tar = Tar("a.tar", str(path))
        assert isinstance(tar.places.base, np.memmap) and len(tar) == 5
        for i in range(5):
            found = tar._members(i, ("txt", "json", "png"))
            assert found == {split_name(name)[1]: data for name, data in content.items() if name.startswith(f"{i}.")}
