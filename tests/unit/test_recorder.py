"""What a recorder writes of an iteration."""

from __future__ import annotations

from dataclasses import replace

import pytest

from progrpo.tracking.console import Console
from progrpo.tracking.run_folder import RunFolder
from progrpo.training.notices import Notices
from progrpo.training.recorder import Recorder


@pytest.mark.parametrize("pictures", [0, 3])
def test_a_process_that_has_no_pictures_left_writes_no_samples_and_warns_of_nothing(
    tiny_trainer, tiny_config, tmp_path, pictures
):
    trainer = tiny_trainer(tiny_config())
    done = trainer.step()
    left = done.rollout.pictures.take(slice(pictures))  # none where plan.keep_groups has stopped all of its groups
    notices, folder = Notices(Console(1, enabled=False)), RunFolder(tmp_path)
    recorder = Recorder(folder, None, trainer.ranks, notices)
    recorder.iteration(replace(done, rollout=replace(done.rollout, pictures=left)), with_samples=True)
    assert not notices.sentences
    assert (tmp_path / "samples" / "0000.png").exists() == (pictures > 0)
