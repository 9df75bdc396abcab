"""Every shipped recipe is parsed, checked and planned; files and run folders load as recipes do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from progrpo.checks import check
from progrpo.config import Config, config_from_json, config_to_json, plan_costs, prompt_cost, resolve_plan
from progrpo.recipes import RECIPES, describe, load_recipe
from progrpo.training.estimate import estimate


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_parsed_checked_and_planned(name):
    config = load_recipe(name)
    check(config)
    assert config.recipe == name
    assert config_from_json(config_to_json(config)) == config
    costs = plan_costs(config, resolve_plan(config))
    assert 0 < costs["nfe_per_prompt"] <= costs["nfe_full_group"]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_says_what_it_is_in_one_line(name):
    assert describe(name).endswith(".") and len(describe(name)) < 100


def test_embedded_guidance_costs_one_call():
    config = load_recipe("flux-pickscore")
    cost = prompt_cost(config, resolve_plan(config))
    assert cost.nfe == 48 * 4 + 24 + 12  # of 48 members 24 live on after the fourth call, 12 after the fifth
    assert cost.trained_steps == 12 * 5


def test_a_videos_clip_range_is_given_and_not_scaled_down_by_its_size():
    config = load_recipe("wan-pickscore")
    assert config.objective.grpo.clip_range == 1e-4 and config.model.frames == 33
    assert prompt_cost(config, resolve_plan(config)).nfe == 2 * (16 * 12 + 8 * 8)


def test_tasks_of_sd35m_differ_in_reward_prompts_and_kl_alone():
    betas = {
        "pickscore": 0.01,
        "hpsv2": 0.01,
        "geneval": 0.04,
        "ocr": 0.04,
    }  # of Flow-GRPO's configurations; hpsv2's is ours
    base = load_recipe("sd35m-pickscore")
    assert (base.model.resolution, base.plan.preset, base.optim.lr) == (512, "standard", 3e-4)
    rewards = {task: task for task in betas} | {"geneval": "geneval_flow_grpo"}
    for task, beta in betas.items():
        config = load_recipe(f"sd35m-{task}")
        assert [term.name for term in config.reward.terms] == [rewards[task]] and config.objective.grpo.kl_beta == beta
        own: dict[str, Any] = {
            "recipe": config.recipe,
            "prompts": config.prompts,
            "reward": config.reward,
            "objective": config.objective,
        }
        assert replace(base, **own, eval=replace(base.eval, prompts=config.eval.prompts)) == config


@pytest.mark.parametrize("name", [name for name in RECIPES if name.endswith("gb")])
def test_lean_recipes_learn_the_same_of_fewer_prompts(name):
    lean, base = load_recipe(name), load_recipe(name.rpartition("-")[0])
    assert lean.prompts.per_iteration == 8 and lean.sampling.latent_dtype == "bfloat16"
    for part in ("plan", "reward", "objective", "eval"):
        assert getattr(lean, part) == getattr(base, part)
    assert replace(lean.optim, microbatch=base.optim.microbatch) == base.optim


@pytest.mark.slow
def test_z_image_fits_on_a_card_of_16_gb():
    """As calculated, the reward included; without the 8 bits its update alone is larger."""
    config = load_recipe("z-image-pickscore")
    estimated = estimate(config, "rtx5080", 0.35, 1)
    assert estimated["fits"] and estimated["device_gb"] == 16 and "rewards_not_counted" not in estimated
    plain = replace(config, model=replace(config.model, quantize="none"))
    assert estimate(plain, "rtx5080", 0.35, 1)["peak_gb"]["update"] > 16


def test_a_config_file_and_a_run_folder_load_as_recipes(tmp_path):
    config = Config(recipe="mine", seed=7)
    (tmp_path / "config.json").write_text(config_to_json(config))
    assert load_recipe(str(tmp_path / "config.json")) == load_recipe(str(tmp_path)) == config


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"quikstart is no recipe .* did you mean quickstart\?"):
        load_recipe("quikstart")


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no recipe"):
        load_recipe(str(tmp_path))


@pytest.mark.parametrize("content", [b'{"sed": 1}', b"{", b"\xff\xfe{\x00"])
def test_a_wrong_file_is_refused_by_its_name(tmp_path, content):
    file = tmp_path / "mine.json"
    file.write_bytes(content)
    with pytest.raises(ValueError) as refused:
        load_recipe(str(file))
    assert str(refused.value).startswith(f"{file}: ")
