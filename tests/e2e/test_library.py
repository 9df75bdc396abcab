"""A run in a few lines of Python, and what it leaves for diffusers."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file

import progrpo
from progrpo.cli import main
from progrpo.config import (
    AuditSettings,
    EvalSettings,
    ModelSettings,
    ObjectiveSettings,
    OptimSettings,
    PlanSettings,
    PromptSettings,
    RewardSettings,
    RewardTerm,
    SamplingSettings,
)
from progrpo.rewards.base import Score
from progrpo.rollout.noise import INITIAL, NoiseKey
from progrpo.tracking.run_folder import RunFolder
from progrpo.training.entry import train_run
from progrpo.training.errors import Interrupted, MissingScoresError, SelfCheckError
from progrpo.types import Prompt

STEPS = 3
FILES = (
    "config.json",
    "metrics.jsonl",
    "summary.json",
    "report.html",
    "evaluation/before.json",
    "evaluation/after/002.png",
    "audit/0001.json",
    "audit/0001.png",
    "samples/0001.png",
    "checkpoints/iteration_000002/manifest.json",
    "lora/pytorch_lora_weights.safetensors",
)


@pytest.fixture(scope="module")
def trained(tiny_pipeline, tiny_config, prompts, redness, tmp_path_factory):
    """Run folders of a few lines each, by the decay of the average of the weights; steps are long, to be seen."""

    def train(ema_decay: float) -> Path:
        config = tiny_config(
            optim=OptimSettings(lr=0.03, ema_decay=ema_decay),
            audit=AuditSettings(every=2),
            eval=EvalSettings(pictures=3, num_inference_steps=STEPS),
        )
        out = tmp_path_factory.mktemp("runs") / "run"
        return progrpo.train(tiny_pipeline(), prompts, redness, config=config, out=out).path

    return {decay: train(decay) for decay in (0.0, 0.5)}


@pytest.fixture(scope="module")
def summary(trained) -> dict[str, Any]:
    return json.loads((trained[0.0] / "summary.json").read_text())


def grey(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file)).astype(int)


def test_a_run_leaves_its_files(trained):
    for out in trained.values():
        assert [name for name in FILES if not (out / name).is_file()] == []
        assert not list(out.rglob("*.writing"))


def test_the_summary_says_what_came_of_it(summary):
    assert (summary["recipe"], summary["seed"], summary["iterations"], summary["status"]) == ("tiny", 0, 2, "finished")
    assert summary["reward_before"] != summary["reward_after"] and 0 < summary["reward_after"] < 1
    assert summary["accuracy_before"] is summary["accuracy_after"] is summary["judge_after"] is None
    assert summary["nfe"] == 2 * 2 * (4 + 4 + 3 + 3) and summary["nfe_saved"] == pytest.approx(2 / 16)
    predicted, counted = summary["cost"]["predicted"], summary["cost"]["counted"]
    assert all(predicted[name] == counted[name] for name in ("nfe", "decodes", "reward_calls"))
    assert 0 < counted["trained_steps"] <= predicted["trained_steps"]  # who is at the mean is not computed
    assert list(summary["preview_rank_correlation"]) == ["1"]
    assert list(summary["preview_rank_correlation_by_step"]) == ["0", "1", "2", "3"]
    assert list(summary["preview_variance"]) == ["1"]
    of_each, most = (summary[f"preview_variance{name}_by_step"] for name in ("", "_final"))
    assert list(of_each) == ["0", "1", "2", "3"] and all(0 <= of_each[step] <= most[step] for step in of_each)
    assert summary["versions"]["progrpo"] == progrpo.__version__ and "torch" in summary["versions"]
    assert summary["device"].startswith(("cpu", "NVIDIA")) and summary["wall_seconds"] > 0


def test_the_report_shows_rewards_where_there_are_no_verdicts(trained):
    page = (trained[0.0] / "report.html").read_text()
    assert "the mean reward went from" in page and "± nan" not in page and "+nan" not in page


@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
def test_the_lora_gives_diffusers_the_pictures_that_the_run_shows(trained, tiny_pipeline, prompts, ema_decay):
    run, pipeline = trained[ema_decay], tiny_pipeline()
    for when in ("before", "after"):
        if when == "after":
            pipeline.load_lora_weights(run / "lora")
        for i, prompt in enumerate(prompts):
            place, first = torch.tensor([i]), torch.tensor([0])
            picture = pipeline(
                prompt,
                latents=NoiseKey(EvalSettings().seed, 0).draw(place, first, INITIAL, (4, 8, 8)),
                height=16,
                width=16,
                num_inference_steps=STEPS,
                guidance_scale=1.0,
                max_sequence_length=8,
            ).images[0]
            shown = grey(run / "evaluation" / when / f"{i:03d}.png")
            assert np.abs(np.asarray(picture).astype(int) - shown).max() <= 1


def test_training_and_averaging_are_seen_in_the_pictures(trained):
    before, after, averaged = (
        grey(trained[decay] / "evaluation" / when / "000.png")
        for decay, when in ((0.0, "before"), (0.0, "after"), (0.5, "after"))
    )
    assert np.abs(before - after).max() > 3 and np.abs(after - averaged).max() > 3
    assert np.array_equal(before, grey(trained[0.5] / "evaluation" / "before" / "000.png"))


def test_the_whole_denoiser_can_be_trained(tiny_pipeline, tiny_config, prompts, redness, tmp_path):
    from diffusers import SD3Transformer2DModel

    base = tiny_config(iterations=1)
    config = replace(base, model=replace(base.model, weights="full"))
    run = progrpo.train(tiny_pipeline(), prompts, redness, config=config, out=tmp_path / "run")
    trained = SD3Transformer2DModel.from_pretrained(run.path / "transformer").state_dict()
    start = tiny_pipeline().transformer.state_dict()
    assert trained.keys() == start.keys() and any(not torch.equal(trained[name], start[name]) for name in start)
    assert not (run.path / "lora").exists()


class Verdicts:
    """A reward of one's own with strict verdicts, from a column."""

    def score(self, images: list[Image.Image], prompts: list[str], least: list[float]) -> list[Score]:
        means = [float(np.asarray(image).mean()) / 255 for image in images]
        return [Score(mean, mean > bound) for mean, bound in zip(means, least, strict=True)]


def test_a_reward_with_verdicts_and_columns(tiny_pipeline, tiny_config, prompts, tmp_path):
    asked = [
        Prompt(text, {"least": least, "kind": kind})
        for text, least, kind in zip(prompts, (0, 0, 1), "aab", strict=True)
    ]
    config = tiny_config(iterations=1, eval=EvalSettings(pictures=3, num_inference_steps=2, every=1))
    splits = {"train": asked, "test": asked, "validation": asked[2:]}
    run = progrpo.train(tiny_pipeline(), splits, Verdicts(), config=config, out=tmp_path / "run")
    saved = run.summary.read()
    assert saved["accuracy_after"] == pytest.approx(2 / 3) and saved["accuracy_by_kind_after"] == {"a": 1.0, "b": 0.0}
    (record,) = run.metrics.read()
    assert record["reward/strict"] in (0.5, 1.0) and record["eval/strict"] == 0


def test_several_rewards_of_every_kind_are_mixed(tiny_pipeline, tiny_config, prompts, redness, tmp_path):
    async def blueness(images, prompts):
        return [float(np.asarray(image)[..., 2].mean()) / 255 for image in images]

    class Greenness:
        def score(self, images, prompts, note):
            return [float(np.asarray(image)[..., 1].mean()) / 255 for image in images]

    rewards = [
        redness,
        (blueness, 0.5),
        (Greenness(), -1.0),
        ("jpeg_incompressibility", 0.1),
        lambda i, p: [0.0] * len(i),
    ]
    rewards += [(lambda i, p: [1.0] * len(i), 2.0)]
    rows = [{"prompt": text, "note": "from a row"} for text in prompts]
    config = tiny_config(iterations=1, objective=ObjectiveSettings(advantage="gdpo"))
    run = progrpo.train(tiny_pipeline(), rows, rewards, config=config, out=tmp_path / "run")
    summary = run.summary.read()
    record: Any
    (record,) = run.metrics.read()
    weights = summary["rewards"]["weights"]
    assert list(weights.values()) == [1.0, 0.5, -1.0, 0.1, 1.0, 2.0] and summary["rewards"]["selected_on"].endswith(
        "group"
    )
    means = [record[f"reward/mean@{name}"] for name in weights]
    assert record["reward/mean"] == pytest.approx(sum(w * m for w, m in zip(weights.values(), means, strict=True)))
    assert means[-2:] == [0.0, 1.0] and means[3] > 0.3
    assert set(summary["rewards"]["asked"].values()) == {3 + 8 + 6 + 3}  # evaluations, previews and finals
    terms = json.loads((run.path / "config.json").read_text())["reward"]["terms"]
    assert [term["name"] for term in terms] == list(weights)


def test_a_plan_that_selects_on_final_rewards_is_audited_and_reported(
    tiny_pipeline, tiny_config, prompts, redness, tmp_path
):
    plan = PlanSettings("custom", group_size=4, final_keep=2)
    config = tiny_config(iterations=1, plan=plan, audit=AuditSettings(every=1))
    run = progrpo.train(tiny_pipeline(), prompts, redness, config=config, out=tmp_path / "run")
    (audit,) = run.read_audits()
    assert sorted(map(str, audit["stopped_at"])) == ["4", "4", "None", "None"]
    assert "pruned at the end" in (run.path / "report.html").read_text()
    assert run.summary.read()["nfe_saved"] == 0


@dataclass(eq=False)
class Held:
    """A reward that notes when it is closed, and fails then by `fault`."""

    reward: Any
    closed: list[Held]
    fault: str = ""

    def score(self, images, prompts):
        return self.reward(images, prompts)

    def close(self):
        self.closed.append(self)
        if self.fault:
            raise ConnectionError(self.fault)


def test_a_reward_that_cannot_be_closed_is_warned_of(tiny_pipeline, tiny_config, prompts, redness, tmp_path, capsys):
    closed: list[Held] = []
    held = [Held(redness, closed, fault="the judge\nis out") for _ in range(2)]
    config = tiny_config(iterations=1)
    run = progrpo.train(tiny_pipeline(), prompts, held, config=config, out=tmp_path / "run")
    assert len(closed) == 2 and "ConnectionError: the judge is out" in capsys.readouterr().out
    assert run.summary.read()["status"] == "finished" and (run.path / "report.html").is_file()


@pytest.mark.parametrize("works", [True, False])
def test_an_async_reward_is_loaded_asked_and_closed_in_one_loop_however_the_run_ends(
    works, tiny_pipeline, tiny_config, prompts, redness, tmp_path
):
    events: list[str] = []

    class Whole:
        async def load(self):
            self.one, self.loop = asyncio.Semaphore(1), asyncio.get_running_loop()
            events.append("load")

        async def score(self, images, prompts):
            async def of(image):
                async with self.one:
                    await asyncio.sleep(0)
                    return redness([image], None)[0]

            events.append("score")
            return await asyncio.gather(*map(of, images))

        async def close(self):
            assert asyncio.get_running_loop() is self.loop
            events.append("close")

    def lacking(images, absent):
        raise AssertionError("asked")

    config = tiny_config(iterations=1, reward=RewardSettings(waves=2))
    if works:
        run = progrpo.train(tiny_pipeline(), prompts, Whole(), config=config, out=tmp_path / "run")
        (missing,) = run.summary.read()["rewards"]["missing"].values()
        assert missing == 0 and events.count("score") > 2
    else:
        with pytest.raises(ValueError, match="takes 'absent'"):
            progrpo.train(tiny_pipeline(), prompts, [Whole(), lacking], config=config, out=tmp_path / "run")
    assert [event for event in events if event != "score"] == ["load", "close"] and events[-1] == "close"


# --- going on ---------------------------------------------------------------------------------------------------------


def untimed(folder: Path) -> list[dict[str, Any]]:
    records = RunFolder(folder).metrics.read()
    return [{k: v for k, v in r.items() if k != "seconds" and not k.startswith("time/")} for r in records]


def assert_the_same(folder: Path, straight: Path) -> None:
    """To the last bit: what was measured, and what was trained."""
    assert untimed(folder) == untimed(straight) != []
    for when in ("before", "after"):
        assert RunFolder(folder).evaluations[when].read() == RunFolder(straight).evaluations[when].read() != []
    ours, theirs = (load_file(f / "lora" / "pytorch_lora_weights.safetensors") for f in (folder, straight))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_of_the_library_goes_on_as_if_it_had_not_been_stopped(
    tiny_pipeline, tiny_config, prompts, redness, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    config = tiny_config(
        iterations=4,
        prompts=PromptSettings(per_iteration=2, order="signal"),
        sampling=SamplingSettings(num_inference_steps=4, microbatch=8),
        optim=OptimSettings(lr=0.03, microbatch=8, ema_decay=0.5),
    )
    straight = progrpo.train(tiny_pipeline(), prompts, redness, config=config, out="straight").path
    calls = iter(range(100))

    def preempted(images, prompts):
        if next(calls) == 5:  # one evaluation, then a preview and a final scoring an iteration
            os.kill(os.getpid(), signal.SIGTERM)
        return redness(images, prompts)

    preempted.__module__, preempted.__qualname__ = redness.__module__, redness.__qualname__
    out = tmp_path / "my run"
    with pytest.raises(Interrupted, match=rf"go on with: progrpo\.train\(\.\.\., out='{out}', mode='resume'\)$"):
        progrpo.train(tiny_pipeline(), prompts, preempted, config=replace(config, iterations=3), out=out)
    assert len(RunFolder(out).metrics.read()) == 3
    again = tiny_pipeline()
    for wrong, message in (
        (
            {"prompts": prompts[::-1]},
            r"the training prompts \(prompts given to progrpo.train\) .*mode='resume_changed'",
        ),
        ({"prompts": {"train": prompts, "test": ["a"]}}, "the evaluation prompts"),
        (
            {"config": replace(config, optim=OptimSettings(lr=1.0))},
            "the configuration of .*my run was changed.* optim.lr was",
        ),
        ({"reward": [redness, redness]}, "reward.terms was .*mode='resume_changed'"),
        ({"out": "nowhere"}, "nowhere holds no run to resume"),
        ({"pipeline": moved(tiny_pipeline())}, "the weights of transformer .* are not those that .*my run began with"),
    ):
        asked = {"pipeline": again, "prompts": prompts, "reward": redness, "config": config, "out": out, **wrong}
        with pytest.raises(ValueError, match=message):
            progrpo.train(**asked, mode="resume")
    monkeypatch.chdir(tmp_path.parent)
    progrpo.train(again, prompts, redness, config=config, out=out, mode="resume")
    assert_the_same(out, tmp_path / straight)


def test_a_reward_that_ends_a_run_of_the_library_says_how_to_go_on(
    tiny_pipeline, tiny_config, prompts, redness, tmp_path
):
    calls, out, mended = iter(range(100)), tmp_path / "run", list[bool]()

    def judged(images, prompts):
        return (
            redness(images, prompts) if next(calls) < 4 or mended else [None] * len(images)
        )  # from the second's finals on

    config = tiny_config(iterations=3)
    message = (
        rf"; mend that, and go on from iteration_000002 with: progrpo\.train\(\.\.\., out='{out}', mode='resume'\)$"
    )
    with pytest.raises(MissingScoresError, match=message):
        progrpo.train(tiny_pipeline(), prompts, judged, config=config, out=out)
    mended.append(True)
    run = progrpo.train(tiny_pipeline(), prompts, judged, config=config, out=out, mode="resume")
    assert run.summary.read()["status"] == "finished" and len(run.metrics.read()) == 3


def moved(pipeline: Any) -> Any:
    next(pipeline.transformer.parameters()).data[0] += 1e-3
    return pipeline


def test_a_run_of_the_library_goes_on_by_its_own_configuration_and_with_changes_that_are_accepted(
    tiny_pipeline, tiny_config, prompts, redness, tmp_path
):
    out = tmp_path / "run"
    progrpo.train(tiny_pipeline(), prompts, redness, config=tiny_config(iterations=1), out=out)
    measured = json.loads((out / "config.json").read_text())
    assert measured["sampling"]["microbatch"] and measured["optim"]["microbatch"]
    run = progrpo.train(tiny_pipeline(), prompts, redness, out=out, mode="resume")
    assert run.summary.read()["status"] == "finished" and len(run.metrics.read()) == 1
    longer = tiny_config(iterations=2, optim=OptimSettings(lr=0.5))
    progrpo.train(tiny_pipeline(), prompts[:2], redness, config=longer, out=out, mode="resume_changed")
    assert json.loads((out / "config.json").read_text())["optim"] == {**measured["optim"], "lr": 0.5}
    assert len(run.metrics.read()) == 2 and any("evaluation prompts" in w for w in run.summary.read()["warnings"])


def test_costs_that_plans_are_judged_by_are_those_of_the_run_s_own_reward(
    tiny_pipeline, tiny_config, prompts, redness, tmp_path
):
    out = tmp_path / "run"
    folder = progrpo.train(tiny_pipeline(), prompts, redness, config=tiny_config(iterations=1), out=out)
    costs = {"call": 1.0, "preview": 2.0, "finish": 3.0, "train": 4.0}
    folder.costs.write(costs)
    progrpo.train(tiny_pipeline(), prompts, redness, config=tiny_config(iterations=2), out=out, mode="resume")
    assert folder.costs.read() == costs
    other = ["jpeg_compressibility"]
    progrpo.train(tiny_pipeline(), prompts, other, config=tiny_config(iterations=3), out=out, mode="resume_changed")
    assert folder.costs.read() is None


def test_another_plan_begins_anew(tiny_pipeline, tiny_config, prompts, redness, tmp_path):
    """Also one that adapts, which goes on with what audits chose where it is the same."""
    of_two, of_three = (
        PlanSettings("custom", group_size=4, prune=((1, 2),)),
        PlanSettings("custom", group_size=4, prune=((2, 3),), adaptive=True),
    )
    audit, out = AuditSettings(every=1), tmp_path / "run"
    first = tiny_config(iterations=1, plan=of_two, audit=audit)
    progrpo.train(tiny_pipeline(), prompts, redness, config=first, out=out)
    longer = tiny_config(iterations=2, plan=of_three, audit=audit)
    run = progrpo.train(tiny_pipeline(), prompts, redness, config=longer, out=out, mode="resume_changed")
    assert run.summary.read()["plan"]["path"] == [4, 3]


def test_a_refused_resume_closes_the_rewards(tiny_pipeline, tiny_config, prompts, redness, tmp_path):
    closed: list[Held] = []
    out, held = tmp_path / "run", Held(redness, closed)
    with pytest.raises(ValueError, match="no run"):
        progrpo.train(tiny_pipeline(), prompts, held, config=tiny_config(), out=out, mode="resume")
    progrpo.train(tiny_pipeline(), prompts, held, config=tiny_config(iterations=1), out=out)
    del closed[:]
    with pytest.raises(ValueError, match=r"optim\.lr was"):
        config = tiny_config(iterations=1, optim=OptimSettings(lr=0.5))
        progrpo.train(tiny_pipeline(), prompts, held, config=config, out=out, mode="resume")
    assert closed == [held]


def test_a_run_of_relative_paths_is_used_from_any_folder(tiny_sd3, tiny_config, prompts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(tiny_sd3)
    Path("data").mkdir()
    Path("data/prompts.csv").write_text("\n".join(["caption", *prompts]))
    config = tiny_config(
        iterations=1,
        prompts=PromptSettings(source="data/prompts.csv", column="caption", per_iteration=2),
        reward=RewardSettings((RewardTerm("jpeg_compressibility"),)),
        eval=EvalSettings(prompts="data/prompts.csv", column="caption", pictures=2, num_inference_steps=1),
    )
    train_run(replace(config, model=replace(config.model, path="model")), Path("run"))
    monkeypatch.chdir(tmp_path.parent)
    run = str(tmp_path / "run")
    assert main(["train", "--resume", run, "--iterations", "2"]) == 0
    assert main(["eval", run, "--pictures", "2", "--num-inference-steps", "1"]) == 0
    assert main(["sample", run, "--prompt", "a", "--out", str(tmp_path / "samples")]) == 0


def test_commands_say_what_a_run_of_the_library_needs(trained, tiny_sd3, tmp_path, capsys, monkeypatch):
    run = trained[0.0]
    monkeypatch.chdir(tmp_path)
    config = json.loads((run / "config.json").read_text())
    assert config["model"]["path"] == "a StableDiffusion3Pipeline given to progrpo.train"
    assert config["prompts"]["source"] == config["eval"]["prompts"] == "prompts given to progrpo.train"
    assert [(t["name"].rpartition(":")[2], t["from_python"]) for t in config["reward"]["terms"]] == [("redness", True)]
    reward = config["reward"]["terms"][0]["name"]
    for words, message in (
        (
            ["train", "--resume", run],
            f"go on with progrpo.train(..., out={str(run)!r}, mode='resume'), with these given again",
        ),
        (
            ["train", run, "--model.path", tiny_sd3],
            "prompts.source, eval.prompts, reward.terms: a run of progrpo.train had",
        ),
        (["sample", run, "--prompt", "a"], f"name the model it was: progrpo sample MODEL --lora {run}"),
        (["eval", run], f"progrpo eval MODEL --lora {run} --prompts FILE --reward {reward}"),
        (["eval", tiny_sd3, "--lora", run], f"progrpo eval {tiny_sd3} --lora {run} --prompts FILE --reward {reward}"),
    ):
        assert main([str(word) for word in words]) == 2
        assert message in (said := capsys.readouterr().err) and said.count("\n") == 1
    assert main(["sample", str(tiny_sd3), "--lora", str(run), "--prompt", "a", "--num-inference-steps", "1"]) == 0
    Path("prompts.csv").write_text("caption,kind\na cat,x\n")
    given = "--prompts prompts.csv --column caption --reward jpeg_compressibility --pictures 2 --num-inference-steps 1"
    assert main(["eval", str(tiny_sd3), "--lora", str(run), *given.split()]) == 0


def test_prompts_that_are_cut_are_said_at_the_start_and_kept(tiny_pipeline, tiny_config, redness, tmp_path, capsys):
    begins = "a red cat beside a green bird and " * 4
    config = tiny_config(iterations=1, eval=EvalSettings(pictures=4, num_inference_steps=STEPS))
    prompts = [f"{begins}{end}" for end in ("a dog", "a cat")] + ["cat"]
    splits = {"train": prompts, "test": ["CAT", "dog", *prompts[:2]]}
    run = progrpo.train(tiny_pipeline(), splits, redness, config=config, out=tmp_path / "run")
    said = capsys.readouterr().out
    (both,) = (w for w in run.summary.read()["warnings"] if "trained on as well" in w)
    assert both.startswith("3 of 4 evaluation prompts are trained on") and both.endswith("the first is 'CAT'")
    (warning,) = (w for w in run.summary.read()["warnings"] if "longer than the text encoders read" in w)
    assert re.match("2 of [45] prompts are longer", warning) and "so that 2 are read like another one" in warning
    assert said.count(f"warning: {warning}") == 1
    assert said.index(warning) < said.index("evaluating the model as it is")


def test_rewards_that_are_all_missing_stop_the_run_with_a_sentence(tiny_pipeline, tiny_config, prompts, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(SelfCheckError, match=r"3 of 3 scores of reward .*lambda.* are missing"):
        progrpo.train(
            tiny_pipeline(), prompts, lambda images, prompts: [None] * len(images), config=tiny_config(), out=out
        )
    saved = json.loads((out / "summary.json").read_text())
    assert saved["status"].startswith("stopped: evaluation after 0 iterations: 3 of 3 scores of reward")
    assert saved["reward_before"] is None and saved["iterations"] == 0


def test_an_interrupted_run_says_so_and_keeps_what_it_has(tiny_pipeline, tiny_config, prompts, redness, tmp_path):
    calls = iter(range(100))

    def impatient(images, prompts):
        if next(calls) == 3:  # one evaluation, then a preview and a final scoring an iteration
            raise KeyboardInterrupt
        return redness(images, prompts)

    with pytest.raises(KeyboardInterrupt):
        progrpo.train(tiny_pipeline(), prompts, impatient, config=tiny_config(), out=tmp_path / "run")
    saved = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (saved["status"], saved["iterations"], saved["nfe"]) == ("stopped: KeyboardInterrupt", 1, 2 * 14)
    assert (tmp_path / "run" / "checkpoints" / "iteration_000001").is_dir()


def test_mistakes_are_refused_before_anything_is_sampled(
    trained, tiny_pipeline, tiny_config, prompts, redness, tmp_path
):
    for wrong, message in (
        ({"prompts": []}, "prompts is empty; give at least one"),
        ({"prompts": {"train": prompts, "dev": prompts}}, r"prompts as a mapping .* not \['train', 'dev'\]"),
        ({"mode": "anew"}, "^mode must be one of new, overwrite, resume, resume_changed, not 'anew'$"),
        ({"config": tiny_config(optim=OptimSettings(lr=0.0))}, r"optim\.lr must be above 0, not 0\.0"),
        (
            {"config": tiny_config(model=ModelSettings(single_file="tuned.safetensors"))},
            r"config\.model\.single_file must be empty for progrpo\.train: load the pipeline from the file",
        ),
        (
            {"config": tiny_config(prompts=PromptSettings(pairs="p.jsonl"), objective=ObjectiveSettings(name="dpo"))},
            r"config\.prompts\.pairs must be empty for progrpo\.train",
        ),
        ({"out": trained[0.0]}, "already holds a run"),
        (
            {"reward": [(redness, 1, 2)]},
            r"a reward with a weight must be a pair \(reward, weight\), not \(<function redn",
        ),
        ({"reward": [(redness, "x")]}, r"reward\.terms\[0\]\.weight must be a number, not 'x'"),
        ({"reward": [(redness, 0)]}, r"reward\.terms: every weight is 0, so that nothing is rewarded"),
        ({"reward": Verdicts}, r"reward Verdicts is a class; give an object of it, Verdicts\(\.\.\.\)"),
        ({"prompts": [{"prompt": "a", "least": 0.5}, "b"], "reward": Verdicts()}, "takes 'least', but the prompt 'b'"),
    ):
        asked = {"prompts": prompts, "reward": redness, "config": tiny_config(), "out": tmp_path / "run", **wrong}
        with pytest.raises(ValueError, match=message):
            progrpo.train(tiny_pipeline(), **asked)
    assert not (tmp_path / "run").exists()


def test_a_pipeline_that_has_an_adapter_is_refused_until_that_is_gone(
    tiny_pipeline, tiny_config, prompts, redness, tmp_path
):
    asked = {"prompts": prompts, "reward": redness, "config": tiny_config(iterations=1), "out": tmp_path / "run"}
    pipeline = tiny_pipeline()
    pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match=r"^the pipeline's transformer has an adapter already: call fuse_lora\(\) and"):
        progrpo.train(pipeline, **asked)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    with pytest.raises(ValueError, match="takes no pictures"):
        progrpo.train(pipeline, **asked | {"reward": lambda: None})  # which is known before it is taken over
    progrpo.train(pipeline, **asked)
    with pytest.raises(ValueError, match=r"^this pipeline was given to a run already, .*; load it again$"):
        progrpo.train(pipeline, **asked)


def test_a_run_can_be_overwritten_if_asked(tiny_pipeline, tiny_config, prompts, redness, tmp_path):
    config, out = tiny_config(iterations=1, eval=EvalSettings(pictures=1, num_inference_steps=1)), tmp_path / "run"
    first = progrpo.train(tiny_pipeline(), prompts, redness, config=config, out=out).metrics.read()
    again = progrpo.train(tiny_pipeline(), prompts, redness, config=config, out=out, mode="overwrite").metrics.read()
    assert len(again) == 1 and again[0]["reward/mean"] == first[0]["reward/mean"]


def test_the_best_weights_on_the_way_are_kept_if_asked(tiny_pipeline, tiny_config, prompts, redness, tmp_path):
    config = tiny_config(
        iterations=4,
        optim=OptimSettings(lr=0.1),
        eval=EvalSettings(pictures=3, num_inference_steps=STEPS, every=1, keep_best=True),
    )
    run = progrpo.train(tiny_pipeline(), prompts, redness, config=config, out=tmp_path / "run")
    records: Any = run.metrics.read()
    on_the_way = [r["eval/graded"] for r in records]  # on the same prompts here as after
    summary: Any = run.summary.read()
    assert summary["reward_after"] == max(on_the_way) and len(set(on_the_way)) == 4
    assert on_the_way[summary["best_iterations"] - 1] == max(on_the_way)
