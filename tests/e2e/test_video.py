"""A model of videos through the command line: rewards of frames and of whole videos, and a report.

diffusers loads the LoRA.
"""

from __future__ import annotations

import base64
import re
import sys
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageSequence

from progrpo.cli import main
from progrpo.tracking.run_folder import RunFolder

REWARD = """
from collections import Counter

import numpy as np

calls = Counter()


def redness(images, prompts):
    calls["redness"] += 1
    assert all(image.size == (32, 16) for image in images)
    return [float(np.asarray(image)[..., 0].mean()) / 255 for image in images]


def motion(images, prompts):
    calls["motion"] += 1
    assert all(image.shape == (5, 16, 32, 3) for image in images)
    return [float(np.abs(np.diff(image.astype(float), axis=0)).mean()) / 255 for image in images]


motion.video = True
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with prompts and rewards, as the current one."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "video_rewards.py").write_text(REWARD)
    (folder / "prompts.txt").write_text("red cat\nblue dog\ngreen bird\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        yield folder


@pytest.fixture(scope="module")
def trained(here: Path, tiny_wan: Path) -> Path:
    """The folder of a run of two rewards, with audits, further preview steps and a probe."""
    options = ["--prompts.source", "prompts.txt", "--eval.prompts", "prompts.txt", "--eval.pictures", "3"]
    options += ["--model.path", str(tiny_wan), "--model.resolution", "16", "32", "--model.frames", "5"]
    options += ["--optim.lr", "0.01"]
    options += ["--reward.terms", "video_rewards:redness", "2*video_rewards:motion", "--reward.frames", "3"]
    options += ["--model.max-sequence-length", "16"]
    options += ["--sampling.guidance-scale", "2", "--preview.ode-steps", "2", "--preview.probe", "--audit.every", "1"]
    options += ["--eval.rewards", "jpeg_compressibility"]
    assert main(["train", "smoke", "--out", "run", *options]) == 0
    return here / "run"


def test_a_run_on_videos_counts_what_it_predicts_and_reports(trained):
    run = RunFolder(trained)
    summary = run.summary.read()
    assert summary["status"] == "finished" and summary["cost"]["predicted"] == summary["cost"]["counted"]
    assert summary["reward_before"] != summary["reward_after"]
    assert summary["rewards"]["missing"] == {"video_rewards:redness": 0, "video_rewards:motion": 0}
    calls = sys.modules["video_rewards"].calls
    assert calls["redness"] == 3 * calls["motion"] > 0  # frames
    after: Any = run.evaluations["after"].read()
    pictures = [record["picture"] for record in after]
    assert len(pictures) == 3 and all(np.asarray(Image.open(trained / name)).shape == (16, 32, 3) for name in pictures)
    assert all(record["held_out"]["jpeg_compressibility"] < 0 for record in after)
    (first, *_) = run.read_audits()
    assert Image.open(trained / first["strip"]).size[1] == 16 * len(first["final"])
    report = re.findall(r"data:image/jpeg;base64,([\w+/=]+)", (trained / "report.html").read_text())
    shown = Counter(Image.open(BytesIO(base64.b64decode(picture))).size for picture in report)
    assert shown == {(32, 16): 2 * 3, (7 * 32, 6 * 16): 2}  # before and after, and audits of 6 by 6 steps and the end


def test_diffusers_loads_what_was_trained(trained, tiny_wan):
    def drawn(lora: Path | None) -> Any:
        pipeline = DiffusionPipeline.from_pretrained(tiny_wan)
        pipeline.set_progress_bar_config(disable=True)
        if lora is not None:
            pipeline.load_lora_weights(lora, local_files_only=True)
        noise = torch.Generator().manual_seed(0)
        options = {"height": 16, "width": 32, "num_frames": 5, "num_inference_steps": 3, "max_sequence_length": 8}
        return pipeline("red cat", generator=noise, output_type="np", **options).frames

    assert np.abs(drawn(trained / "lora") - drawn(None)).max() > 1e-3


def test_a_video_is_written_as_an_animated_picture(trained, here):
    assert main(["sample", "run", "--prompt", "red cat", "--count", "2", "--out", "videos"]) == 0
    files = sorted((here / "videos").glob("*.webp"))
    assert [file.name for file in files] == ["000-00.webp", "000-01.webp"]
    for file in files:
        with Image.open(file) as video:
            assert (video.format, video.size) == ("WEBP", (32, 16)) and len(ImageSequence.all_frames(video)) == 5


def test_a_trained_model_of_videos_is_measured(trained, capsys):
    rewards = ["--reward", "video_rewards:redness", "2*video_rewards:motion"]
    assert main(["eval", "run", *rewards, "--pictures", "2", "--num-inference-steps", "2"]) == 0
    assert "\n  reward " in capsys.readouterr().out
    calls = sys.modules["video_rewards"].calls
    assert calls["redness"] == 3 * calls["motion"]  # the run's own number of frames
