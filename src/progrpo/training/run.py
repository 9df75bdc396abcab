"""A run that was checked and built, with its model, but has not begun."""

from __future__ import annotations

import time
from itertools import chain

from progrpo.config import to_dict
from progrpo.prompts.load import ignored_column_note
from progrpo.prompts.pictures import check_sources
from progrpo.rewards.mixture import closed_where_refused
from progrpo.tracking.run_folder import RunFolder
from progrpo.training.distributed import Ranks
from progrpo.training.equal_inputs import require_same_model
from progrpo.training.inputs import RunInputs, audits_warning, noise_warning
from progrpo.training.measure import with_measured_microbatches
from progrpo.training.trainer import Trainer


class Run:
    """The parts of a run, ready for `loop.TrainingLoop`."""

    def __init__(self, inputs: RunInputs, folder: RunFolder, ranks: Ranks) -> None:
        """ValueError for what cannot work, before a folder is made or an old run replaced."""
        self.started = time.perf_counter()
        """The start of this attempt, before its model is loaded."""
        self.inputs = inputs
        self.folder = folder
        self.ranks = ranks
        with closed_where_refused(inputs.rewards):
            inputs.check(ranks)
            self.policy = inputs.load()
            require_same_model(ranks, self.policy)
            if self.policy.edits:
                check_sources(inputs.all_prompts)
            config = with_measured_microbatches(inputs.config, self.policy, inputs.order.prompts_for(0, 1)[0], ranks)
            self.trainer = Trainer(config, self.policy, inputs.reward, inputs.order, ranks)

    def create_folder(self, overwrite: bool) -> None:
        """Make the run folder, once every part of the run could be built. ValueError if it holds a run already."""
        config = to_dict(self.trainer.config)
        self.ranks.from_main(lambda: RunFolder.create(self.folder.path, overwrite).log_config(config))

    def warnings(self) -> list[str]:
        """Warnings of what the run ignores or cuts, known before it begins."""
        prompts = self.inputs.all_prompts
        cuts = self.policy.truncation([prompt.text for prompt in prompts]).in_words()
        overlap = None if self.policy.edits else self.inputs.overlap_warning()
        idle = [audits_warning(self.trainer.config), noise_warning(self.trainer.config)]
        return [w for w in (self.policy.ignored, cuts, ignored_column_note(prompts), overlap, *idle) if w]

    def encode_prompts(self) -> None:
        """Encode every prompt that this process will need, once, and let the text encoders leave memory."""
        config = self.trainer.config
        ahead = self.inputs.order.possible_prompts(
            self.trainer.iteration, config.iterations, config.prompts.per_iteration
        )
        held_out = self.inputs.held_out
        validation = held_out.validation if config.eval.every else ()
        prompts = {id(prompt): prompt for prompt in chain(ahead, held_out.test, validation)}
        # one by one: the policy keeps the rows on the CPU, and the device never holds them all
        for prompt in prompts.values():
            self.policy.encode([prompt])
        self.policy.release_text_encoders()
