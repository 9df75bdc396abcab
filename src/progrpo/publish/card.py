"""The model card of a run in the hub's form: YAML front matter, and what was trained, how, and with what result.

Texts of the run may be a stranger's. They are YAML by its writer, escaped in Markdown, and Python by `repr` in code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from typing import TYPE_CHECKING, Any

from progrpo.pages.run_data import RunData, accuracy
from progrpo.publish.base import Base
from progrpo.tracking.records import EvaluationRecord
from progrpo.tracking.statistics import Mean, interval, mean_of
from progrpo.tracking.wording import MISSING, count, duration, number, percent

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

_PUNCTUATION = re.compile(r"([!-/:-@\[-`{-~])")
_LORA = "lora"


@dataclass(frozen=True)
class Example:
    """A test prompt with its picture after training, as a file of the repository."""

    prompt: str
    file: str


@dataclass(frozen=True)
class Contents:
    """The repository's contents beside the card: the folder's name of the weights, examples, and a grid of pairs.

    `second` are the files of other denoisers' LoRAs than the first's.
    """

    weights: str
    second: Sequence[str]
    examples: Sequence[Example]
    grid: str | None


def model_card(data: RunData, repo: str, base: Base, contents: Contents) -> str:
    parts = [
        f"# {text(repo.rpartition('/')[2])}",
        _introduction(data, base, contents),
        _pictures(contents),
        f"## Use\n\n{_use(data, repo, base, contents)}",
        f"## Result\n\n{_result(data)}",
        f"## Training\n\n{_training(data)}",
        f"## Limitations\n\n{_limitations(data, base)}",
    ]
    return f"---\n{_front_matter(data, repo, base, contents)}\n---\n\n" + "\n\n".join(filter(None, parts)) + "\n"


def text(value: object) -> str:
    """A text on one line that Markdown shows as it is."""
    return _PUNCTUATION.sub(r"\\\1", " ".join(str(value).split()))


def code(source: str, language: str) -> str:
    """A block of code, in a fence that is longer than any within."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", source)), default=0))
    return f"{fence}{language}\n{source}\n{fence}"


# --- front matter -----------------------------------------------------------------------------------------------------


def _front_matter(data: RunData, repo: str, base: Base, contents: Contents) -> str:
    from huggingface_hub import ModelCardData

    relation = "adapter" if contents.weights == _LORA else "finetune"
    optional: dict[str, Any] = dict(base.licence)
    if base.id is not None:
        optional |= {"base_model": base.id, "base_model_relation": relation}
    if contents.examples:
        optional["widget"] = [{"text": e.prompt, "output": {"url": e.file}} for e in contents.examples]
    card = ModelCardData(
        **optional,
        library_name="progrpo" if base.id is None else "diffusers",
        pipeline_tag=base.task,
        tags=[base.task, *(["lora"] if contents.weights == _LORA else []), "diffusers", "progrpo"],
        model_name=repo.rpartition("/")[2],
        eval_results=_eval_results(data, base) or None,
    )
    return card.to_yaml().strip()


def _eval_results(data: RunData, base: Base) -> list[EvalResult]:
    """The figures after training that are measured."""
    from huggingface_hub import EvalResult

    measured = {"accuracy": accuracy(data.after), "reward": _mean_reward(data.after)}
    return [
        EvalResult(
            task_type=base.task,
            dataset_type="prompts",
            dataset_name=f"{len(data.after)} test prompts of the run",
            metric_type=name,
            metric_name={"accuracy": "strict accuracy", "reward": "mean reward"}[name],
            metric_value=round(mean.value, 4),
        )
        for name, mean in measured.items()
        if mean is not None
    ]


def _mean_reward(records: Sequence[EvaluationRecord]) -> Mean | None:
    known = [value for record in records if (value := record["graded"]) is not None]
    return mean_of(known) if known else None


# --- sections ---------------------------------------------------------------------------------------------------------


def _introduction(data: RunData, base: Base, contents: Contents) -> str:
    model = (
        f"[{text(base.id)}](https://huggingface.co/{base.id})" if base.id else f"progrpo’s built-in {text(base.name)}"
    )
    what = "A LoRA for" if contents.weights == _LORA else f"The {contents.weights} of"
    return (
        f"{what} {model}, trained by online reinforcement learning with progrpo (after arXiv"
        f" 2512.15347) towards {_rewards(data)}."
    )


def _rewards(data: RunData) -> str:
    rewards = data.summary.get("rewards")
    weights = rewards["weights"] if rewards else {}
    names = [text(name) if len(weights) == 1 else f"{weight:g} × {text(name)}" for name, weight in weights.items()]
    return " + ".join(names) or "its reward"


def _pictures(contents: Contents) -> str:
    if contents.grid is None:
        return ""
    prompts = "\n".join(f"{i}. {text(example.prompt)}" for i, example in enumerate(contents.examples, 1))
    about = "Above before training, below after it, from the same noise:"
    return f"![before and after]({contents.grid})\n\n{about}\n\n{prompts}"


def _use(data: RunData, repo: str, base: Base, contents: Contents) -> str:
    prompt = contents.examples[0].prompt if contents.examples else "a photo of a red cat"
    if base.id is None:
        command = (
            f"pip install progrpo\nhf download {repo} --local-dir model\nprogrpo sample model --prompt {_shell(prompt)}"
        )
        return f"The base model is part of progrpo, so progrpo draws with it:\n\n{code(command, 'bash')}"
    return code(usage(data, repo, base, contents, prompt), "python")


def usage(data: RunData, repo: str, base: Base, contents: Contents, prompt: str) -> str:
    """The program that draws with the trained weights."""
    weights = contents.weights
    video, edits = base.task == "text-to-video", base.task == "image-to-image"
    helpers = [name for name, used in {"export_to_video": video, "load_image": edits}.items() if used]
    arguments = [
        repr(prompt),
        *(['image=load_image("picture.png")'] if edits else []),
        *(f"{name}={data.setting('eval', name)!r}" for name in ("num_inference_steps", "guidance_scale")),
        *(f"{side}={size!r}" for side in ("height", "width") if (size := data.setting("model", "resolution"))),
        *([f"num_frames={frames!r}"] if (frames := data.setting("model", "frames")) else []),
    ]
    if edits:
        arguments[0] = f"prompt={prompt!r}"
    lora = weights == _LORA
    loaded = ["DiffusionPipeline"] if lora else ["AutoModel", "DiffusionPipeline"]
    lines = [
        "import torch",
        f"from diffusers import {', '.join(loaded)}",
        *([f"from diffusers.utils import {', '.join(helpers)}"] if helpers else []),
        "",
        'device = "cuda" if torch.cuda.is_available() else "cpu"',
        'dtype = torch.bfloat16 if device == "cuda" else torch.float32',
        *(
            [
                f"pipeline = DiffusionPipeline.from_pretrained({base.id!r}, dtype=dtype)",
                f"pipeline.load_lora_weights({repo!r})",
                *(
                    f"pipeline.load_lora_weights({repo!r}, weight_name={name!r}, load_into_transformer_2=True)"
                    for name in contents.second
                ),
            ]
            if lora
            else [
                f"{weights} = AutoModel.from_pretrained({repo!r}, subfolder={weights!r}, dtype=dtype)",
                f"pipeline = DiffusionPipeline.from_pretrained({base.id!r}, {weights}={weights}, dtype=dtype)",
            ]
        ),
        "pipeline.to(device)",
        f"result = pipeline({', '.join(arguments)})",
        'export_to_video(result.frames[0], "video.mp4", fps=16)' if video else 'result.images[0].save("result.png")',
    ]
    return "\n".join(lines)


def _result(data: RunData) -> str:
    shares = accuracy(data.before), accuracy(data.after)
    rewards = [_mean_reward(records) for records in (data.before, data.after)]
    rows = [
        ("strict accuracy", *(_interval(mean, percent) for mean in shares)),
        ("mean reward", *(_interval(mean, number) for mean in rewards)),
    ]
    rows = [row for row in rows if row[1:] != (MISSING, MISSING)]
    if not rows:
        return "The run was not evaluated."
    table = "\n".join(f"| {' | '.join(row)} |" for row in [("", "before", "after"), ("---", "---:", "---:"), *rows])
    change = data.accuracy_change()
    moved = "" if change is None else f" Picture by picture, strict accuracy changed by {_points(change)} points."
    return f"{table}\n\nOf {len(data.after)} test prompts, with 95 % intervals.{moved}"


def _points(change: Mean) -> str:
    half = interval(change).half
    return f"{100 * change.value:+.1f}" + ("" if isnan(half) else f" ± {100 * half:.1f}")


def _interval(mean: Mean | None, write: Callable[[float | None], str]) -> str:
    """A mean with its 95 % interval, which a single value does not have."""
    if mean is None:
        return MISSING
    half = interval(mean).half
    return write(mean.value) + ("" if isnan(half) else f" ± {write(half)}")


def _training(data: RunData) -> str:
    source = str(data.setting("prompts", "source") or "").rpartition("/")[2]
    path = " → ".join(map(str, data.path_of_plan))
    facts: Mapping[str, object] = {
        "recipe": text(data.recipe),
        "prompts": f"{text(source)}; no pictures to imitate, only the model’s own with their rewards",
        "rewards": _rewards(data),
        "iterations": f"{data.iterations} of {data.setting('prompts', 'per_iteration')} prompts",
        "members of a group": path or MISSING,
        "objective, learning rate": f"{text(data.setting('objective', 'name'))}, {data.setting('optim', 'lr'):g}",
        "network evaluations": count(data.summary.get("nfe")),
        "time": f"{duration(data.wall_seconds)} on {text(data.summary.get('device') or 'one device')}",
        "seed": text(data.config.get("seed")),
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    typed = " ".join(str(data.summary.get("command") or "").split())
    started = f"It was started by:\n\n{code(typed, 'bash')}\n\n" if typed.startswith("progrpo train") else ""
    again = code("progrpo train config.json --out runs/again", "bash")
    about = "`config.json` has every setting, with files by their names:"
    return f"| | |\n| --- | --- |\n{rows}\n\n{started}{about}\n\n{again}"


def _limitations(data: RunData, base: Base) -> str:
    warnings = data.summary.get("warnings")
    said = [f"- The run warned: {text(w)}." for w in warnings] if isinstance(warnings, list) else []
    return "\n".join(
        [
            "- Training exaggerates what its reward measures; what the reward does not see may have become worse.",
            f"- The figures are of the prompts of this run, and of the sampler and steps above. Limits and biases of"
            f" {text(base.name)} remain.",
            *said,
        ]
    )


def _shell(value: str) -> str:
    import shlex

    return shlex.quote(value)
