"""Source pictures of prompts: the same pixels from every form, and a sentence about what is no picture."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from progrpo.prompts.pictures import check_sources, open_picture, open_pictures, picture_key, source_key, source_picture
from progrpo.types import Prompt

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)


@pytest.fixture
def file(tmp_path) -> Path:
    Image.fromarray(PIXELS).save(tmp_path / "source.png")
    return tmp_path / "source.png"


def test_a_path_a_files_bytes_and_a_picture_are_the_same(file):
    for value in (file, str(file), file.read_bytes(), Image.fromarray(PIXELS)):
        opened = source_picture(Prompt("a", {"image": value}))
        assert opened.mode == "RGB" and np.array_equal(np.asarray(opened), PIXELS)
    check_sources([Prompt("a", {"image": value}) for value in (str(file), file.read_bytes(), Image.fromarray(PIXELS))])


def test_pictures_are_upright_and_rgb(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    Image.fromarray(PIXELS).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(np.asarray(open_picture(tmp_path / "turned.png")), np.rot90(PIXELS, -1))
    assert open_picture(Image.new("LA", (2, 3))).mode == "RGB"


# --- transparency -----------------------------------------------------------------------------------------------------

RED, HALF_RED, BLUE_UNDER_NOTHING = (255, 0, 0, 255), (255, 0, 0, 128), (0, 0, 255, 0)
ON_WHITE = [(255, 0, 0), (255, 127, 127), (255, 255, 255)]  # 128 / 255 of red over white, and white alone


def row(mode: str, values: list[Any]) -> Image.Image:
    drawn = Image.new(mode, (len(values), 1))
    drawn.putdata(values)
    return drawn


def seen(value: object) -> list[tuple[int, ...]]:
    return [tuple(pixel) for pixel in np.asarray(open_picture(value))[0].tolist()]


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_what_is_transparent_is_seen_on_white():
    drawn = row("RGBA", [RED, HALF_RED, BLUE_UNDER_NOTHING])
    kinds = {"PNG": {}, "WEBP": {"lossless": True, "exact": True}, "TIFF": {}}
    for value in (drawn, drawn.convert("RGBa"), *(saved(drawn, kind, **options) for kind, options in kinds.items())):
        assert seen(value) == [pytest.approx(pixel, abs=1) for pixel in ON_WHITE]


def test_grey_that_is_transparent_is_seen_on_white():
    drawn = row("LA", [(100, 255), (0, 128), (0, 0)])
    for value in (drawn, saved(drawn), drawn.convert("La")):
        assert seen(value) == [pytest.approx((g, g, g), abs=1) for g in (100, 127, 255)]


def test_a_palette_or_a_colour_that_is_transparent_is_seen_on_white():
    palette = row("P", [0, 1, 2])
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    assert seen(saved(palette)) == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    for value in (saved(palette, transparency=1), saved(palette, "GIF", transparency=1)):  # one colour of it
        assert seen(value) == [(255, 0, 0), (255, 255, 255), (0, 0, 255)]
    half = saved(palette, transparency=bytes([255, 0, 128]))  # each of its own
    assert seen(half) == [(255, 0, 0), (255, 255, 255), pytest.approx((127, 127, 255), abs=1)]
    plain = row("RGB", [(1, 2, 3), (9, 9, 9)])
    assert seen(saved(plain, transparency=(9, 9, 9))) == [(1, 2, 3), (255, 255, 255)]
    assert seen(saved(row("L", [7, 9]), transparency=9)) == [(7, 7, 7), (255, 255, 255)]


def test_a_transparent_picture_is_turned_upright_as_well():
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    assert seen(saved(row("RGBA", [RED, HALF_RED, BLUE_UNDER_NOTHING]), exif=exif)) == [
        pytest.approx(pixel, abs=1) for pixel in ON_WHITE[::-1]
    ]


def test_a_column_is_read_once_a_value_and_may_have_gaps(file):
    value = str(file)
    one, nothing, other = open_pictures([value, None, value])
    assert one is other and nothing is None


def test_a_key_is_a_path_or_what_is_held(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawn, changed = Image.fromarray(PIXELS), Image.fromarray(PIXELS ^ 1)
    assert picture_key("source.png") == picture_key(file) == source_key(Prompt("a", {"image": str(file)}))
    assert picture_key(drawn) == picture_key(drawn.copy()) != picture_key(changed)
    assert picture_key(drawn) != picture_key(Image.fromarray(PIXELS.reshape(7, 5, 3)))
    assert picture_key(b"a") != picture_key(b"b")


def test_what_is_no_picture_is_said_in_a_sentence(tmp_path, file):
    postscript = BytesIO()
    Image.fromarray(PIXELS).save(postscript, "EPS")  # which Pillow has another program read
    (tmp_path / "text.png").write_text("none")
    for value, message in (
        (None, "the prompt 'a' has no column image: this model changes a picture"),
        ("", "cannot be read as a picture"),
        ("a\0b", "cannot be read as a picture"),
        ("none.png", "none.png cannot be read as a picture: no such file"),
        (str(tmp_path), "cannot be read as a picture"),
        (tmp_path / "text.png", "cannot be read as a picture"),
        (postscript.getvalue(), "its content cannot be read as a picture"),
        (["a"], r"column image of the prompt 'a' must be a picture or the path of one, not \['a'\]"),
        (Image.fromarray(np.full((2, 2), 40_000, np.uint16)), r"it has more than 8 bits a channel \(mode I;16\); save"),
        (Image.new("F", (2, 2)), r"it has more than 8 bits a channel \(mode F\); save it with 8$"),
    ):
        for look in (source_picture, lambda prompt: check_sources([prompt])):
            with pytest.raises(ValueError, match=message) as caught:
                look(Prompt("a", {} if value is None else {"image": value}))
            assert "\n" not in str(caught.value)
    cut = file.read_bytes()[:60]
    with pytest.raises(ValueError, match="its content cannot be read as a picture"):
        open_picture(cut)
