"""Commands around preferences: pairs, label, reward-model train and reward-model eval."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from progrpo.cli.command import Command, check_device, check_range
from progrpo.cli.output import format_result, show
from progrpo.messages import quoted


@dataclass(frozen=True, kw_only=True)
class PairsCheck(Command):
    """Check a pairs file: every fault with its line, or what the file holds."""

    pairs: Annotated[Positional[Path], arg(metavar="PAIRS")]
    """The pairs file: .jsonl, .json, .csv or .parquet (docs/preferences.md)."""
    prompts: str | None = None
    """`shapes`, a prompt file or dataset:NAME. A pair with another prompt is a fault."""
    column: str = "prompt"
    """The field of rows of `--prompts` that holds the text."""

    def run(self) -> None:
        from progrpo.preferences.agreement import agreement, counts
        from progrpo.preferences.pairs import read_pairs
        from progrpo.prompts.load import load_prompts

        known = None
        if self.prompts is not None:
            by_kind = load_prompts(self.prompts, column=self.column)
            known = {prompt.text for prompts in by_kind.values() for prompt in prompts}
        pairs = read_pairs(self.pairs, known, decode=True)
        of_annotators = agreement(pairs)
        lines = [f"{name:<12}{count:,}" for name, count in counts(pairs).items()]
        lines.append(f"{'agreement':<12}{of_annotators or 'no pair was compared by two annotators'}")
        show("\n".join(lines))


@dataclass(frozen=True, kw_only=True)
class PairsConvert(Command):
    """Turn a public data set of preferences into a pairs file, or a pairs file into the form of one."""

    source: Annotated[Positional[Path], arg(metavar="SOURCE")]
    """The file as it was published: .parquet, .json or .jsonl (docs/preferences.md)."""
    to: Path
    """The file to write: .jsonl for progrpo, .parquet for pickapic and imagereward, .json for hpdv2."""
    from_format: Literal["auto", "pickapic", "hpdv2", "imagereward", "progrpo"] = "auto"
    """The format of the source. `auto`: by its columns."""
    format: Literal["progrpo", "pickapic", "hpdv2", "imagereward"] = "progrpo"
    """The format to write."""
    images: Path | None = None
    """The folder at which paths of pictures start. Without it: the source's folder."""

    def run(self) -> None:
        from progrpo.preferences.formats import convert

        try:
            converted = convert(self.source, self.to, self.from_format, self.format, self.images)
        except OSError as error:
            raise ValueError(f"{error.filename or self.to} cannot be written: {error.strerror}") from None
        for note in converted.notes:
            print(f"note: {note}", file=sys.stderr)
        show(f"{self.to}: {converted.pairs:,} pairs")


@dataclass(frozen=True, kw_only=True)
class Label(Command):
    """Compare pictures on a local page; each vote is a line of a pairs file."""

    folder: Annotated[Positional[Path], arg(metavar="RUN|FOLDER")]
    """A run folder (before and after), a folder of `progrpo sample`, one with a pairs.jsonl, or that of the reward
    `votes`. The votes are in its votes.jsonl."""
    annotator: str = ""
    """Your name, which stands beside your votes. It can be changed on the page."""
    count: int | None = None
    """The most pairs to ask about, spread over the prompts. Without it: all."""
    host: str = "127.0.0.1"
    """The address to listen at. All who can reach it can see the pictures and vote."""
    port: int = 8200
    """The port; 0 is any free one."""

    def run(self) -> None:
        check_range(1, 10**6, count=self.count)
        check_range(0, 65_535, port=self.port)
        from progrpo.preferences.label import serve

        serve(self.folder, self.annotator, self.count, self.host, self.port)


@dataclass(frozen=True, kw_only=True)
class RewardModelTrain(Command):
    """Learn a reward from pairs: a reward model that `--reward.terms` takes."""

    pairs: Annotated[Positional[Path], arg(metavar="PAIRS")]
    """The pairs file (docs/preferences.md)."""
    out: Path
    """The folder of the reward model. One that is there is replaced."""
    backbone: str = "auto"
    """The network that sees the pictures: `shapes` for those of the built-in models, or a CLIP: a folder or a hub id.
    `auto` is `shapes` where the pairs are of the shapes world, and an error elsewhere."""
    latent: str | None = None
    """Train a latent reward head of this model instead: a built-in model's name, a run, a folder or a hub id.
    It sees latents and no prompt, and ranks unfinished trajectories as `--preview.latent-reward` of `train`."""
    lora_rank: int = 0
    """The rank of a LoRA with which the CLIP is tuned; 0: it stays frozen."""
    members: int = 8
    """The heads, each on its own resample of the prompts. Their mean is the score, their variance its uncertainty."""
    label_noise: str = "auto"
    """The share of labels that are wrong by chance, below 0.5. `auto`: 0, 0.1, 0.2 or 0.3, by cross-validation."""
    held_out: str = "0.2"
    """The share of the prompts that is held out, or a pairs file, to measure the reward model on. 0: none."""
    seed: int = 0
    """The seed of what is held out and of resamples."""
    device: str = "auto"
    """The device of a CLIP."""
    json: FlagCreatePairsOff[bool] = False
    """Print JSON."""

    def run(self) -> None:
        check_range(0, 256, lora_rank=self.lora_rank)
        check_range(1, 256, members=self.members)
        check_range(0, 2**63 - 1, seed=self.seed)
        check_device(self.device)
        held_out, noise = self._held_out(), self._label_noise()
        if self.latent is not None and (self.backbone != "auto" or self.lora_rank):
            raise ValueError("--latent sees latents, not pictures; leave --backbone and --lora-rank out")
        from progrpo.preferences.reward_model.training import TrainingSettings, train_reward_model

        settings = TrainingSettings(
            self.backbone, self.lora_rank, self.members, noise, held_out, self.seed, self.device
        )
        load_latent = None
        if self.latent is not None:
            from progrpo.training.latent_reward import latent_backbone

            load_latent = functools.partial(latent_backbone, self.latent)
        result = train_reward_model(
            self.pairs, self.out, settings, lambda line: print(line, file=sys.stderr), load_latent
        )
        show(format_result(result if self.json else _in_short(result), self.json), costly=True)

    def _label_noise(self) -> float | None:
        if self.label_noise == "auto":
            return None
        try:
            rate = float(self.label_noise)
        except ValueError:
            rate = math.nan
        if not 0 <= rate < 0.5:
            raise ValueError(f"--label-noise must be auto, or a share below 0.5, not {quoted(self.label_noise)}")
        return rate

    def _held_out(self) -> float | Path:
        try:
            share = float(self.held_out)
        except ValueError:
            return Path(self.held_out)
        if not 0 <= share < 1:
            raise ValueError(
                f"--held-out must be a share of at least 0 and below 1, or a pairs file, not {quoted(self.held_out)}"
            )
        return share


@dataclass(frozen=True, kw_only=True)
class RewardModelEval(Command):
    """Measure a reward model on pairs that it has not seen."""

    folder: Annotated[Positional[Path], arg(metavar="FOLDER")]
    """The folder of the reward model."""
    pairs: Annotated[Positional[Path], arg(metavar="PAIRS")]
    """The pairs file."""
    device: str = "auto"
    """The device of a CLIP."""
    json: FlagCreatePairsOff[bool] = False
    """Print JSON."""

    def run(self) -> None:
        check_device(self.device)
        from progrpo.preferences.pairs import read_pairs
        from progrpo.preferences.reward_model.evaluation import evaluate_pairs
        from progrpo.preferences.reward_model.model import load_reward_model, read_description

        read_description(self.folder)  # before many pictures are opened
        pairs = read_pairs(self.pairs, decode=True)
        result = evaluate_pairs(load_reward_model(self.folder, self.device), pairs)
        show(format_result(result if self.json else measures_in_short(result), self.json), costly=True)


def _in_short(result: Mapping[str, Any]) -> dict[str, object]:
    """The result of a training as a table: what is held out, or what cross-validation says if nothing is."""
    held_out = result["held_out"]
    measures = measures_in_short(held_out or result["cross_validated"])
    where = "held out" if held_out else "cross-validated"
    return {
        "backbone": result["backbone"],
        "pairs": result["pairs"],
        "label noise": f"{result['label_noise']:.0%}",
        **{f"{where}: {name}": value for name, value in measures.items()},
        "seconds": result["seconds"],
    }


def measures_in_short(result: Mapping[str, Any]) -> dict[str, object]:
    """Accuracy, calibration and uncertainty as lines of a table."""

    def share(name: str) -> str:
        low, high = result[name]
        return f"{low:.1%} to {high:.1%}"

    bins = [f"{b['confidence']:.0%} sure: {b['share']:.0%} right of {b['pairs']:,}" for b in result["bins"]]
    return {
        "pairs": f"{result['pairs']:,} of {result['prompts']:,} prompts, {result['ties']:,} ties",
        "accuracy": f"{result['accuracy']:.1%} ({share('interval')}; by prompt {share('interval_by_prompt')})",
        "log loss": result["log_loss"],
        "calibration error": f"{result['calibration_error']:.3f} ({'; '.join(bins)})",
        "variance": result.get("variance"),
    }
