"""Pairs files: every fault by its line, all at once, and files that read as they were written."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from progrpo.preferences.pairs import Pair, PairsError, read_pairs, write_pairs
from progrpo.types import Prompt


@pytest.fixture
def folder(tmp_path):
    for number in range(4):
        Image.new("RGB", (8, 8), (60 * number, 0, 0)).save(tmp_path / f"{number}.png")
    return tmp_path


def row(**changes):
    return {"prompt": "a cat", "image_a": "0.png", "image_b": "1.png", "preference": "a", **changes}


def written(folder, *rows):
    path = folder / "pairs.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


def faults(path, **options):
    with pytest.raises(PairsError) as caught:
        read_pairs(path, **options)
    return caught.value.faults


def test_pairs_are_read_as_they_were_written(folder):
    pairs = [
        Pair(Prompt("a cat"), folder / "0.png", folder / "1.png", 1.0),
        Pair(Prompt("a cat", {"count": 2, "image": str(folder / "3.png")}), folder / "0.png", folder / "2.png", 0.0),
        Pair(Prompt("ein Kätzchen"), folder / "1.png", folder / "2.png", 0.5, 2.0, "ann"),
        Pair(Prompt("a cat"), folder / "1.png", folder / "3.png", 0.75, 1.0, "bob"),
    ]
    path = folder / "pairs.jsonl"
    write_pairs(path, pairs)
    assert read_pairs(path, decode=True) == pairs
    assert json.loads(path.read_text().splitlines()[1]) == {
        "prompt": "a cat", "count": 2, "image": "3.png", "image_a": "0.png", "image_b": "2.png", "preference": "b"
    }  # fmt: skip


def test_paths_start_at_the_folder_of_the_file(folder, tmp_path, monkeypatch):
    (folder / "inner").mkdir()
    path = folder / "inner" / "pairs.jsonl"
    write_pairs(path, [Pair(Prompt("a cat"), folder / "0.png", folder / "1.png", 1.0)])
    assert json.loads(path.read_text())["image_a"] == "../0.png"
    monkeypatch.chdir(folder)
    (pair,) = read_pairs(Path("inner/pairs.jsonl"))
    assert pair.image_a.is_file()
    assert read_pairs(written(folder, row(image_a=str(folder / "2.png"))))[0].image_a == folder / "2.png"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[1]", "must be an object such as"),
        (row(image_a="9.png"), "image_a: no picture"),
        (row(image_b=3), "image_b must be the path of a picture, not 3"),
        (row(image_b="https://a.b/c.png"), "is a URL"),
        (row(image_b="text.png"), "cannot be read as a picture"),
        (row(prompt=" "), "prompt must be a text that is not empty"),
        ({"image_a": "0.png", "image_b": "1.png", "preference": "a"}, "has no field named prompt"),
        (row(prompt="a Cat"), "is none of the known prompts; it is written 'a cat' there"),
        (row(prompt="a dog"), "'a dog' is none of the known prompts"),
        (row(preference="A"), "preference must be"),
        (row(preference=1.5), "not 1.5"),
        (row(preference=True), "not True"),
        (row(preference=None), "not None"),
        ({"prompt": "a cat", "image_a": "0.png", "image_b": "1.png"}, "and is missing"),
        (row(strength=0), "strength must be a number above 0"),
        (row(strength="2"), "strength must be a number above 0, not '2'"),
        (row(annotator=3), "annotator must be a text"),
        (row(image_b="./0.png"), "image_a and image_b are the same picture"),
    ],
)
def test_a_fault_names_its_line(folder, line, reason):
    (folder / "text.png").write_text("no picture")
    good = row(image_b="3.png")
    (fault,) = faults(written(folder, good, line), prompts={"a cat"})
    assert fault.startswith("line 2: ")
    assert reason in fault


def test_all_faults_are_listed_at_once(folder):
    path = written(
        folder,
        row(),
        row(image_a="8.png", image_b="9.png", preference="c"),
        "{",
        row(),
        row(image_a="1.png", image_b="0.png", preference="b"),
        row(preference="b"),
        row(preference="b", annotator="ann"),
        row(preference="a", annotator="ann"),
        row(preference="a", annotator="bob"),
    )
    listed = faults(path)
    assert [fault.split(":")[0] for fault in listed] == ["line 2", "line 3", "line 4", "line 5", "line 6", "line 8"]
    assert listed[0].count(";") == 2
    assert listed[2] == "line 4: repeats line 1"
    assert listed[3] == "line 5: repeats line 1"  # the other way round, it is the same vote
    assert listed[4].startswith("line 6: contradicts line 1")
    assert listed[5].startswith("line 8: contradicts line 7 of 'ann'")


def test_long_lists_are_cut(folder):
    with pytest.raises(PairsError) as caught:
        read_pairs(written(folder, *[row(image_a="9.png")] * 25))
    lines = str(caught.value).splitlines()
    assert len(lines) == 22
    assert "25 lines are wrong" in lines[0]
    assert lines[-1] == "  and 5 more"


@pytest.mark.parametrize(
    ("encoding", "reason"), [("utf-16", "but UTF-16"), ("utf-16-le", "but UTF-16"), ("cp1252", "but perhaps Windows")]
)
def test_other_encodings_are_named(folder, encoding, reason):
    path = folder / "pairs.jsonl"
    path.write_bytes((json.dumps(row(prompt="ein Kätzchen"), ensure_ascii=False) + "\n").encode(encoding))
    assert reason in faults(path)[0]


def test_a_mark_of_utf_8_and_line_ends_of_windows_are_read(folder):
    path = folder / "pairs.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + (json.dumps(row()) + "\r\n\r\n").encode())
    assert len(read_pairs(path)) == 1


def test_a_truncated_picture_is_found_where_pixels_are_read(folder):
    whole = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(whole).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:1000])
    path = written(folder, row(image_a="cut.png"))
    assert len(read_pairs(path)) == 1
    assert "cannot be read as a picture" in faults(path, decode=True)[0]


def test_csv_and_json_are_read_too(folder):
    (folder / "pairs.csv").write_text(
        "prompt,image_a,image_b,preference,strength\na cat,0.png,1.png,0.25,2\na cat,0.png,2.png,tie,\n"
    )
    assert [(pair.preference, pair.strength) for pair in read_pairs(folder / "pairs.csv")] == [(0.25, 2.0), (0.5, 1.0)]
    (folder / "pairs.json").write_text(json.dumps([row(preference="b"), row(image_a="9.png")]))
    assert faults(folder / "pairs.json")[0].startswith("row 1: image_a")


@pytest.mark.parametrize(
    ("name", "reason"),
    [("none.jsonl", "no pairs file"), ("pairs.txt", "pairs must be a file"), ("e.jsonl", "no pair;")],
)
def test_no_pairs_at_all(folder, name, reason):
    (folder / "e.jsonl").touch()
    with pytest.raises(ValueError, match=reason):
        read_pairs(folder / name)


def test_columns_that_cannot_be_written(folder):
    pair = Pair(Prompt("a cat", {"mask": b"1"}), folder / "0.png", folder / "1.png", 1.0)
    with pytest.raises(ValueError, match="JSON cannot hold"):
        write_pairs(folder / "pairs.jsonl", [pair])
    with pytest.raises(ValueError, match="rename the column"):
        write_pairs(folder / "pairs.jsonl", [Pair(Prompt("a", {"strength": 1}), pair.image_a, pair.image_b, 1.0)])
    with pytest.raises(ValueError, match="give it that ending"):
        write_pairs(folder / "pairs.csv", [])
    assert not (folder / "pairs.jsonl").exists()
