"""The page of the studio, by Gradio: prompts before and after training, and a group under a plan of one's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from progrpo.config import resolve_plan
from progrpo.environment import listening_socket
from progrpo.messages import named
from progrpo.pages.page import document, escape, note
from progrpo.pages.report.film import LEGEND, sheet_of
from progrpo.rollout.plan import Plan, PrunePoint
from progrpo.rollout.settings import SELECTORS
from progrpo.studio.trial import Outcome, Shot, Studio, Weights, trusted_config
from progrpo.tracking.wording import number

_LARGEST_GROUP = 48
_FILM_HEIGHT = 900  # of the frame that shows a film, in pixels; it scrolls
_ONE_AT_A_TIME: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
"""The model holds one set of weights, so that no two trials may use it at once."""


def make_app(studio: Studio, title: str) -> gr.Blocks:
    """The page for a run's model. Nothing is sent anywhere."""
    config, names = studio.config, studio.model.names
    with gr.Blocks(title=title, analytics_enabled=False) as app:
        gr.Markdown(f"# {_plain(title)}\n{_plain(config.model.path)}, trained on {_plain(_rewards(studio))}.")
        with gr.Row():
            prompt = gr.Dropdown(
                studio.examples, value=studio.examples[0], label="Prompt", allow_custom_value=True, scale=3
            )
            seed = gr.Number(config.eval.seed, label="Seed", precision=0, minimum=0, maximum=2**53 - 1)
            weights = gr.Dropdown(names, value=names[0], label="Weights")
            strength = gr.Slider(0, 1.5, 1, step=0.05, label="Strength of training")
        chosen = [prompt, seed, weights, strength]
        with gr.Tab("Before and after"):
            _before_and_after(studio, chosen)
        with gr.Tab("Film of a group"):
            _film_of_a_group(studio, chosen)
    return app


# --- before and after -------------------------------------------------------------------------------------------------


def _before_and_after(studio: Studio, chosen: Sequence[gr.components.Component]) -> None:
    settings = studio.config.eval
    with gr.Row():
        steps = gr.Slider(1, 100, settings.num_inference_steps, step=1, label="Steps")
        guidance = gr.Slider(1, 15, settings.guidance_scale, step=0.5, label="Guidance scale")
        button = gr.Button("Draw", variant="primary")
    with gr.Row():
        images = [_shown_image(label) for label in ("Before", "After")]
    rewards = gr.HTML()

    @_in_a_sentence
    def draw(text: str, seed: int, name: str, strength: float, num_steps: int, scale: float) -> list[Any]:
        drawn = replace(settings, seed=int(seed), num_inference_steps=int(num_steps), guidance_scale=float(scale))
        shots = [studio.draw(text, Weights(name, share), drawn) for share in (0.0, strength)]
        return [*(_enlarged(shot.picture) for shot in shots), _rewards_table(shots, studio.refusal(text))]

    inputs = [*chosen, steps, guidance]
    gr.on([button.click, *(part.change for part in chosen[:1])], draw, inputs, [*images, rewards], **_ONE_AT_A_TIME)


def _shown_image(label: str) -> gr.Image:
    buttons = ["download", "fullscreen"]  # and no button that shares it
    return gr.Image(label=label, height=384, image_mode="RGB", interactive=False, buttons=buttons)


def _rewards_table(shots: Sequence[Shot], refusal: str) -> str:
    if refusal:
        return note(escape(f"No rewards: {refusal}."))
    rows = "".join(
        f"<tr><td>{escape(name)}</td>{''.join(f'<td>{_reward(shot.rewards, name)}</td>' for shot in shots)}</tr>"
        for name in shots[0].rewards
    )
    return f"<table><thead><tr><th>Reward</th><th>before</th><th>after</th></tr></thead><tbody>{rows}</tbody></table>"


def _reward(rewards: Mapping[str, float], name: str) -> str:
    return "missing" if math.isnan(rewards[name]) else number(rewards[name], 3)


def _enlarged(picture: np.ndarray | None) -> np.ndarray | None:
    """A small picture at a whole multiple of its size, so that a browser does not blur it."""
    factor = 1 if picture is None else max(1, 384 // picture.shape[0])
    return None if picture is None else picture.repeat(factor, axis=0).repeat(factor, axis=1)


# --- film of a group --------------------------------------------------------------------------------------------------


def _film_of_a_group(studio: Studio, chosen: Sequence[gr.components.Component]) -> None:
    last = studio.config.sampling.num_inference_steps - 2
    plan = _first_plan(resolve_plan(studio.config), last)
    with gr.Row():
        size = gr.Slider(2, _LARGEST_GROUP, plan.group_size, step=1, label="Group size")
        selector = gr.Dropdown(list(SELECTORS), value="ovf", label="Selector")
        final = gr.Slider(0, _LARGEST_GROUP, plan.final_keep or 0, step=1, label="Keep by final rewards (0: all)")
        button = gr.Button("Show the group", variant="primary")
    points = []
    for i, name in enumerate(("First", "Second")):
        point = plan.prune[i] if i < len(plan.prune) else PrunePoint(min(i * 2 + 1, last), 0)
        with gr.Row():
            points += [
                gr.Slider(0, last, point.step, step=1, label=f"{name} prune point: after step"),
                gr.Slider(0, _LARGEST_GROUP, point.keep, step=1, label=f"{name} prune point: keep (0: no point)"),
            ]
    summary, film = gr.HTML(), gr.HTML()

    @_in_a_sentence
    def show(text: str, seed: int, name: str, strength: float, *shape: Any) -> list[str]:
        group_size, chosen_selector, final_keep, *numbers = shape
        pairs = zip(numbers[::2], numbers[1::2], strict=True)
        prune = tuple(PrunePoint(int(step), int(keep)) for step, keep in pairs if keep)
        asked = Plan(int(group_size), prune, int(final_keep) or None)
        outcome = studio.outcome(text, Weights(name, strength), int(seed), asked, chosen_selector)
        return [_summary(outcome), _frame(outcome)]

    inputs = [*chosen, size, selector, final, *points]
    events = [button.click, selector.change, *(slider.release for slider in (size, final, *points))]
    gr.on(events, show, inputs, [summary, film], **_ONE_AT_A_TIME)


def _first_plan(plan: Plan, last: int) -> Plan:
    """The run's plan, or where that stops nobody one that stops half of the group halfway."""
    if plan.prune or plan.final_keep or last < 0:
        return plan
    return Plan(plan.group_size, (PrunePoint((last + 1) // 2, max(2, plan.group_size // 2)),))


def _summary(outcome: Outcome) -> str:
    saved = 1 - outcome.nfe / outcome.plain_nfe
    sentences = [
        f"{outcome.survivors} of {len(outcome.record['final'])} members are trained on.",
        f"The group takes {outcome.nfe} network calls in place of {outcome.plain_nfe} ({saved:.0%} saved).",
    ]
    if outcome.variance is None or outcome.best_variance is None:
        sentences.append("All rewards are equal, so that this group teaches nothing.")
    else:
        sentences.append(
            f"The rewards of the survivors have {number(outcome.variance, 2)} times the variance of the whole group"
            f" (the best choice of as many: {number(outcome.best_variance, 2)})."
        )
    return f"<p>{' '.join(sentences)}</p>"


def _frame(outcome: Outcome) -> str:
    """The film in a frame of its own: its styles and script do not meet those of the page."""
    sheet = sheet_of(outcome.record, Image.fromarray(outcome.sheet), "film")
    page = document("Film of a group", f'{LEGEND}<div class="film" id="film">{sheet}</div>', charts=False)
    return (
        f'<iframe title="film of a group" sandbox="allow-scripts" srcdoc="{escape(page)}"'
        f' style="width: 100%; height: {_FILM_HEIGHT}px; border: 0"></iframe>'
    )


# --- texts and errors -------------------------------------------------------------------------------------------------


def _rewards(studio: Studio) -> str:
    return ", ".join(term.to_text() for term in studio.config.reward.terms)


def _plain(text: str) -> str:
    """A text of a run for Markdown, as itself: a folder may be a stranger's."""
    return "".join(f"&#{ord(c)};" if not c.isalnum() and c != " " else c for c in text)


def _in_a_sentence(action: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """The action, whose ValueError is shown on the page as a sentence."""

    @wraps(action)
    def shown(*values: Any) -> list[Any]:
        try:
            return action(*values)
        except ValueError as error:
            raise gr.Error(escape(error), print_exception=False) from None

    return shown


def serve(run: Path, rewards: Sequence[str], host: str, port: int) -> None:
    """Serve the page of a run until the process is asked to end. ValueError where there is nothing to serve."""
    studio = Studio(run, trusted_config(run, rewards))
    app = make_app(studio, f"progrpo studio: {run.resolve().name}").queue(max_size=32)
    with listening_socket(host, port) as listener:  # Gradio listens by itself, and says less of what is wrong
        free_port = listener.getsockname()[1]
    app.launch(
        server_name=host,
        server_port=free_port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        run_history=False,
        footer_links=[],
        theme=gr.themes.Default(primary_hue="blue"),
    )
    print(f"studio of {named(run)} at {app.local_url} (Ctrl-C ends it)", flush=True)
    app.block_thread()
