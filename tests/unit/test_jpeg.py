"""JPEG sizes: against files on disk, and what they say of smooth and noisy pictures."""

import io

import numpy as np
from PIL import Image

from progrpo.rewards.jpeg import JpegCompressibility, JpegIncompressibility
from progrpo.types import Prompt


def pictures(size: int = 64) -> np.ndarray:
    """From blank to noise."""
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
    steps = [Image.fromarray(noise[:k, :k]).resize((size, size), Image.Resampling.BICUBIC) for k in (1, 4, 16)]
    return np.stack([*map(np.asarray, steps), noise])


def values(sign: int, pictures_NHWC: np.ndarray) -> list[float]:
    scores = (JpegIncompressibility() if sign > 0 else JpegCompressibility()).score(
        pictures_NHWC, [Prompt("")] * len(pictures_NHWC)
    )
    assert all(type(s.value) is float and s.passed is None and s.error is None for s in scores)
    return [s.number() for s in scores]


def test_the_size_of_the_file_in_kilobytes(tmp_path):
    for size in (64, 96):
        expected = []
        for i, picture in enumerate(pictures(size)):
            path = tmp_path / f"{i}.jpg"
            Image.fromarray(picture).save(path, quality=95)
            expected.append(path.stat().st_size / 1000)
        assert values(1, pictures(size)) == expected == sorted(expected)
        assert values(-1, pictures(size)) == [-e for e in expected]


def test_it_is_a_jpeg_of_quality_95_in_colour():
    lower, higher = (_size_of(pictures()[2], quality) for quality in (94, 96))
    assert lower < values(1, pictures()[2:3])[0] < higher
    grey = np.repeat(pictures()[..., :1], 3, axis=-1)
    assert values(1, grey)[3] < values(1, pictures())[3]


def _size_of(picture: np.ndarray, quality: int) -> float:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="JPEG", quality=quality)
    return len(file.getvalue()) / 1000


def test_deterministic_and_of_each_picture_alone():
    drawn = pictures()
    assert values(1, drawn) == values(1, drawn) == [values(1, drawn[i : i + 1])[0] for i in range(len(drawn))]
    assert values(1, drawn[:0]) == []


def test_strided_and_read_only_pictures():
    strided = np.repeat(pictures(), 2, axis=2)[:, :, ::2]
    strided.flags.writeable = False
    assert values(1, strided) == values(1, pictures())
