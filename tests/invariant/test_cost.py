"""The costs that a plan predicts are those that a run counts, and those are what the networks did."""

from __future__ import annotations

import pytest
import torch

from progrpo.config import (
    AuditSettings,
    OptimSettings,
    PlanSettings,
    PromptSettings,
    SamplingSettings,
    from_dict,
    plan_costs,
    stochastic_steps,
)
from progrpo.rollout.plan import PRESETS, Plan
from progrpo.types import Cost

STEPS = 4
PLANS = {
    **{name: from_dict({"plan": {"preset": name}}).plan for name in PRESETS},
    "point-and-final": PlanSettings("custom", group_size=5, prune=((1, 4), (2, 4)), final_keep=2),
    "groups": PlanSettings("custom", group_size=5, prune=((0, 4), (2, 3)), final_keep=2, keep_groups=1),
    "groups-alone": PlanSettings("custom", group_size=3, prune=((1, 3),), keep_groups=1),
}
CASES = {f"{name}-guided": (plan, 3.0) for name, plan in PLANS.items()}
CASES["point-and-final"] = (PLANS["point-and-final"], 1.0)


@pytest.fixture
def trainer(tiny_trainer, tiny_config, tiny_policy, tiny_sd3, request):
    def build(plan: PlanSettings, guidance_scale: float, reward=None, microbatch=None, folder=tiny_sd3):
        policy = tiny_policy(folder=folder)
        config = tiny_config(
            plan=plan,
            prompts=PromptSettings(per_iteration=2 if plan.preset == "custom" else 1),
            sampling=SamplingSettings(
                num_inference_steps=STEPS,
                guidance_scale=guidance_scale,
                embedded_guidance=policy.embeds_guidance,
                microbatch=microbatch,
            ),
            audit=AuditSettings(every=2),
        )
        return tiny_trainer(config, policy, reward=reward or request.getfixturevalue("redness"))

    return build


@pytest.mark.parametrize(("plan", "guidance_scale"), CASES.values(), ids=CASES)
def test_a_run_counts_what_its_plan_predicts(trainer, plan, guidance_scale):
    built = trainer(plan, guidance_scale)
    done = [built.step() for _ in range(2)]
    assert built.totals.counted == built.totals.predicted == built.predicted() * 2
    per_call, group = (2 if guidance_scale > 1 else 1), built.plan.group_size
    previews = Cost(decodes=group * STEPS, reward_calls=group * STEPS, previews=group * STEPS)
    if built.plan == Plan(group):  # a group of the iteration is watched, and under `auto` one of each
        audits = [previews] * (2 if plan.preset == "auto" else 1)
    else:
        audits = [previews + Cost(group * STEPS * per_call, group, group)]
    assert built.totals.audited == sum(audits, Cost())
    of_each = [d.record["audit/nfe"] for d in done if d.audit is not None]
    assert of_each == [audit.nfe for audit in audits] and done[1].audit is not None
    assert sum(d.record["rollout/nfe"] for d in done) == built.totals.counted.nfe


@pytest.mark.parametrize("reuse_rollout", [False, True])
def test_calls_that_equal_members_share_are_counted_once(tiny_trainer, tiny_config, reuse_rollout):
    config = tiny_config(
        plan=PlanSettings("custom", group_size=3),
        sampling=SamplingSettings(
            num_inference_steps=5, microbatch=8, same_latent=True, sde_window="random", sde_window_size=2
        ),
        optim=OptimSettings(reuse_rollout=reuse_rollout),
    )
    built = tiny_trainer(config)
    nfe = [built.step().record["rollout/nfe"] for _ in range(4)]
    starts = [stochastic_steps(config, iteration).start for iteration in range(4)]
    assert len(set(starts)) > 1
    assert nfe == [2 * (3 * 5 - 2 * (start + (not reuse_rollout))) for start in starts]
    assert built.totals.counted == built.totals.predicted
    assert built.plan_monitor.nfe_unpruned == 2 * 3 * 5
    costs = plan_costs(config, built.plan)
    assert (costs["nfe_per_iteration"], costs["nfe_per_prompt"]) == (nfe[0], nfe[0] / 2)
    assert costs["nfe_saved"] == 1 - nfe[0] / 30 and costs["nfe_ratio_to_none"] == nfe[0] / (2 * 24 * 5)


@pytest.mark.parametrize(
    ("plan", "guidance_scale"),
    [
        ("point-and-final", 3.0),
        ("groups", 3.0),
        pytest.param("point-and-final", 1.0, marks=pytest.mark.slow),
    ],
)
def test_what_is_counted_is_what_the_networks_did(trainer, redness, family_at_length, guidance_scale, plan):
    rewarded = []

    def counting(images, prompts):
        rewarded.append(len(images))
        return redness(images, prompts)

    # by one, so that no row only fills a microbatch up
    built = trainer(PLANS[plan], guidance_scale, counting, microbatch=1, folder=family_at_length)
    built.step()  # the first iteration also asks the network for its self-checks
    rewarded.clear()
    sampled: list[int] = []
    trained: list[int] = []
    decoded: list[int] = []
    built.policy.denoiser.register_forward_hook(
        lambda module, args, kwargs, out: (trained if torch.is_grad_enabled() else sampled).append(len(out[0])),
        with_kwargs=True,
    )
    vae = built.policy.pipeline.vae
    first = vae.post_quant_conv if family_at_length.name == "tiny-wan" else vae.decoder  # a video's runs frame by frame
    first.register_forward_hook(lambda module, args, out: decoded.append(len(out)))
    before = built.totals.counted
    built.step()
    assert built.totals.counted == built.totals.predicted
    counted, audited = built.totals.counted, built.totals.audited
    assert sum(sampled) == counted.nfe - before.nfe + audited.nfe
    assert sum(decoded) == sum(rewarded) == counted.decodes - before.decodes + audited.decodes
    assert sum(rewarded) == counted.reward_calls - before.reward_calls + audited.reward_calls
    per_call = 2 if guidance_scale > 1 and not built.policy.embeds_guidance else 1
    assert sum(trained) == (counted.trained_steps - before.trained_steps) * per_call
