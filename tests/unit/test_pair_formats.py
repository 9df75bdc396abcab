"""Public data sets of preferences, in small files with their own columns, as pairs files and back."""

import io
import json
from collections.abc import Mapping

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from progrpo.cli.entry import main
from progrpo.messages import FaultsError
from progrpo.preferences.formats import ENDINGS, convert
from progrpo.preferences.pairs import Pair, read_pairs, write_pairs
from progrpo.types import Prompt


def picture(shade, kind="PNG"):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(file, kind)
    return file.getvalue()


def shade(path):
    with Image.open(path) as image:
        return int(np.asarray(image.convert("RGB"))[0, 0, 0])


def write_parquet(path, rows):
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def converted(source, **options):
    options = {"read_as": "auto", "write_as": "progrpo", **options}
    to = source.with_name(f"out{ENDINGS[options['write_as']]}")
    return to, convert(source, to, **options)


def read(source, **options):
    """The pairs as (prompt, shades of a and b, preference, strength, annotator), and the notes."""
    to, result = converted(source, **options)
    pairs = [
        (p.prompt.text, shade(p.image_a), shade(p.image_b), p.preference, p.strength, p.annotator)
        for p in read_pairs(to, decode=True)
    ]
    assert len(pairs) == result.pairs
    return pairs, result.notes


def pickapic(label, a=10, b=20, **changes):
    row = {"caption": "a cat", "jpg_0": picture(a), "jpg_1": picture(b), "has_label": True, "user_id": 7}
    return {**row, "label_0": label, "label_1": None if label is None else 1 - label, **changes}


def test_pick_a_pic(tmp_path):
    rows = [
        pickapic(1.0),
        pickapic(0.0, b=30),
        pickapic(0.5, b=40, user_id=8),
        pickapic(0.0, a=50, has_label=False),
        pickapic(None, a=60),
        pickapic(0.5, b=10),  # the same picture twice
    ]
    pairs, notes = read(write_parquet(tmp_path / "train.parquet", rows))
    assert pairs == [
        ("a cat", 10, 20, 1.0, 1.0, "7"),
        ("a cat", 10, 30, 0.0, 1.0, "7"),
        ("a cat", 10, 40, 0.5, 1.0, "8"),
    ]
    assert notes == ("2 rows have no label and are left out",)
    names = [path.name for path in (tmp_path / "out-pictures").iterdir()]
    assert len(names) == 4 and all(name.endswith(".png") for name in names)


def test_votes_of_one_annotator_on_the_same_pictures_become_one_pair(tmp_path):
    turned = pickapic(1.0, a=20, b=10)
    pairs, notes = read(write_parquet(tmp_path / "a.parquet", [pickapic(1.0), turned, pickapic(1.0), pickapic(0.5)]))
    assert pairs == [("a cat", 10, 20, 2.5 / 4, 4.0, "7")]
    assert "1 pairs were compared more than once" in notes[0]


@pytest.fixture
def pictures(tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(picture(10 * number))
    return [f"{number}.png" for number in range(4)]


def test_hpdv2_preferences_and_rankings(tmp_path, pictures):
    source = tmp_path / "train.json"
    train = [
        {"prompt": "a cat", "file_path": pictures[:2], "human_preference": [0, 1]},
        {"prompt": "a dog", "image_path": pictures[2:], "human_preference": [1, 0]},
        {"prompt": "a dog", "file_path": pictures[:2], "human_preference": None},
    ]
    source.write_text(json.dumps(train))
    pairs, notes = read(source)
    assert pairs == [("a cat", 0, 10, 0.0, 1.0, ""), ("a dog", 20, 30, 1.0, 1.0, "")]
    assert notes == ("1 rows have no label and are left out",)
    source.write_text(json.dumps([{"prompt": "a cat", "image_path": pictures[:3], "rank": [1, 3, 1]}]))
    assert [(a, b, preference) for _, a, b, preference, *_ in read(source)[0]] == [
        (0, 10, 1),
        (0, 20, 0.5),
        (10, 20, 0),
    ]


def test_the_three_forms_of_imagerewarddb(tmp_path, pictures):
    expected = [(0, 10, 1.0), (0, 20, 0.0), (10, 20, 0.0)]
    common = {"prompt_id": "1-1", "prompt": "a cat", "classification": "Animals"}
    rows = [{**common, "image_path": f"images/train/{p}", "rank": r} for p, r in zip(pictures, (2, 3, 1), strict=False)]
    source = tmp_path / "train_1.json"
    source.write_text(json.dumps(rows))  # the zip's own file: paths of another folder, by name
    assert [pair[1:4] for pair in read(source)[0]] == expected
    images = [{"bytes": picture(10 * n), "path": None} for n in range(3)]
    single = [{**common, "image": image, "rank": rank} for image, rank in zip(images, (2, 3, 1), strict=True)]
    assert [pair[1:4] for pair in read(write_parquet(tmp_path / "1.parquet", single))[0]] == expected
    group = [{**common, "image": images, "rank": [2, 3, 1]}]
    assert [pair[1:4] for pair in read(write_parquet(tmp_path / "2.parquet", group))[0]] == expected
    pair = [{**common, "img_better": images[2], "img_worse": images[1]}]
    assert [pair[1:4] for pair in read(write_parquet(tmp_path / "3.parquet", pair))[0]] == [(20, 10, 1.0)]


def test_every_row_at_fault_is_listed_at_once(tmp_path):
    rows = [
        pickapic(1.0),
        pickapic(1.0, jpg_0=b"GIF89a"),
        pickapic(1.0, jpg_1=None),
        pickapic(0.7),
        pickapic(1.0, caption=" "),
        pickapic(1.0, jpg_0=picture(10)[:20]),
    ]
    with pytest.raises(FaultsError) as caught:
        converted(write_parquet(tmp_path / "train.parquet", rows))
    faults = caught.value.faults
    assert [fault.split(":")[0] for fault in faults] == [f"row {n}" for n in (1, 2, 3, 4, 5)]
    for fault, reason in zip(
        faults, ("neither PNG nor", "jpg_1 holds no picture", "0.5 both", "caption", "jpg_0: its content"), strict=True
    ):
        assert reason in fault, fault
    assert not (tmp_path / "out.jsonl").exists()


def test_pictures_are_looked_for_in_a_named_folder(tmp_path, pictures):
    (tmp_path / "json").mkdir()
    source = tmp_path / "json" / "train.json"
    source.write_text(json.dumps([{"prompt": "a cat", "file_path": pictures[:2], "human_preference": [1, 0]}]))
    with pytest.raises(FaultsError, match="--images names the folder"):
        converted(source)
    assert read(source, images=tmp_path)[0] == [("a cat", 0, 10, 1.0, 1.0, "")]


@pytest.mark.parametrize("form", ["pickapic", "hpdv2", "imagereward"])
def test_pairs_are_written_and_read_back(tmp_path, pictures, form):
    paths = [tmp_path / name for name in pictures]
    pairs = [Pair(Prompt("a cat"), paths[0], paths[1], 1.0), Pair(Prompt("a dog"), paths[2], paths[3], 0.0)]
    source = tmp_path / "pairs.jsonl"
    write_pairs(source, pairs)
    to, result = converted(source, write_as=form)
    assert result.notes == ()
    back, _ = read(to)
    preferred = [(text, a if preference else b) for text, a, b, preference, *_ in back]
    assert preferred == [("a cat", 0), ("a dog", 30)]


def test_what_a_format_does_not_have_is_said(tmp_path, pictures):
    paths = [tmp_path / name for name in pictures]
    prompt = Prompt("a cat", {"count": 1})
    write_pairs(
        tmp_path / "pairs.jsonl",
        [
            Pair(prompt, paths[0], paths[1], 1.0, 2.0, "ann"),
            Pair(prompt, paths[0], paths[2], 0.5, annotator="bob"),
            Pair(prompt, paths[0], paths[3], 0.7),
        ],
    )
    losses = ("no strength", "no names of annotators", "no other columns")
    for form, left_out in (("pickapic", "1 pairs are left out"), ("hpdv2", "2 pairs are left out")):
        _, result = converted(tmp_path / "pairs.jsonl", write_as=form)
        assert result.notes[0].startswith(left_out)
        assert all(any(loss in note for note in result.notes[1:]) for loss in losses)
    columns: Mapping[str, list[object]] = parquet.read_table(tmp_path / "out.parquet").to_pydict()
    assert columns["label_0"] == [1.0, 0.5] and columns["user_id"] == [0, 1] and columns["caption"] == ["a cat"] * 2


def test_the_command_converts_and_refuses(tmp_path, pictures, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = write_parquet(tmp_path / "train.parquet", [pickapic(1.0), pickapic(None, a=50)])
    assert main(["pairs", "convert", source.name, "--to", "new.jsonl"]) == 0
    out, err = capsys.readouterr()
    assert (out.strip(), err.strip()) == ("new.jsonl: 1 pairs", "note: 1 rows have no label and are left out")
    assert main(["pairs", "check", "new.jsonl"]) == 0
    (tmp_path / "other.json").write_text('[{"text": "a cat"}]')
    (tmp_path / "none.json").write_text(json.dumps([{"prompt": "a", "file_path": pictures[:2], "rank": None}]))
    for words, sentence in (
        (("train.parquet", "--to", "x.csv"), "give --to that ending"),
        (("train.parquet", "--to", "x.json", "--format", "pickapic"), "pickapic is written as .parquet"),
        (("other.json", "--to", "x.jsonl"), "those of no known format"),
        (("gone.json", "--to", "x.jsonl"), "no file gone.json"),
        (("0.png", "--to", "x.jsonl"), "the source must be a file"),
        (("new.jsonl", "--to", "new.jsonl"), "--to is the source itself"),
        (("none.json", "--to", "x.jsonl"), "holds no pair with a preference"),
    ):
        assert main(["pairs", "convert", *words]) == 2
        assert sentence in capsys.readouterr().err
