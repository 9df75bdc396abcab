"""The command line as a user meets it. Commands that need a model are tested with training."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import progrpo
from progrpo.cli import COMMANDS, main
from progrpo.config import config_from_json
from progrpo.objectives.settings import OBJECTIVES
from progrpo.prompts.settings import ORDERS
from progrpo.recipes import RECIPES, load_recipe
from progrpo.rollout.settings import PLAN_NAMES, SAMPLERS, SELECTORS

NAMES = (  # of recipes
    "quickstart, shapes-diffusion, words-flow, preferences, sd14-hpsv2, sd35m-pickscore, sd35m-pickscore-24gb,"
    " sd35m-pickscore-48gb, sd35m-pickscore-80gb, sd35m-hpsv2, sd35m-geneval, sd35m-ocr, sd35m-awm, flux-pickscore,"
    " flux-pickscore-24gb, flux-pickscore-48gb, flux-pickscore-80gb, kontext-vlm, flux2-klein-pickscore,"
    " z-image-pickscore, qwen-image-edit, sana-pickscore, wan-pickscore, wan22-pickscore, sd3, smoke"
)


def refusal(capsys, *args):
    """The one line on stderr of a refused command."""
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("progrpo: error: ")
    return err.removeprefix("progrpo: error: ").strip()


def printed(capsys, *args):
    assert main(args) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_who_stops_reading_ends_a_command_without_a_word():
    command = subprocess.Popen(
        [sys.executable, "-m", "progrpo", "recipes", "sd3"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert command.stdout is not None and command.stderr is not None
    command.stdout.close()
    assert command.stderr.read() == b"" and command.wait() == 128 + signal.SIGPIPE
    command.stderr.close()


def test_a_current_folder_that_is_gone_is_a_sentence(tmp_path):
    script = f"mkdir gone; cd gone; rmdir ../gone; {sys.executable} -m progrpo train smoke"
    environment = {**os.environ, "PYTHONPATH": str(Path(progrpo.__file__).parents[1])}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "progrpo: error: the current folder is gone; change to one that is there"


def test_help_is_quick_and_needs_no_torch():
    script = "import sys; from progrpo.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 5  # 0.2 s on a free core; the limit is for a busy machine
    assert all(name in done.stdout for name in COMMANDS)


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "progrpo", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"progrpo {progrpo.__version__}\n"


def test_importing_progrpo_imports_no_torch():
    script = "import sys, progrpo; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        progrpo.trian  # noqa: B018


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"usage: progrpo {command}" in capsys.readouterr().out


def test_help_lists_the_built_in_names_and_takes_others(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    out = capsys.readouterr().out
    for registry in (("recipe", *PLAN_NAMES), PLAN_NAMES, ORDERS, OBJECTIVES, SELECTORS, ("auto", *SAMPLERS)):
        assert f"{{{','.join(registry)}}}|STR" in "".join(out.split())


def test_help_of_a_recipe_shows_its_values(capsys):
    with pytest.raises(SystemExit):
        main(["train", "smoke", "--help"])
    out = capsys.readouterr().out
    assert "--plan.prune" in out and "(default: 3 4)" in out


def test_recipes_are_listed_and_printed(capsys):
    listed = printed(capsys, "recipes")
    assert [line.split()[0] for line in listed.splitlines()] == list(RECIPES)
    assert config_from_json(printed(capsys, "recipes", "smoke")) == load_recipe("smoke")


@pytest.mark.parametrize(
    ("args", "nfe"),
    [
        (("--plan", "standard"), 360),
        (("--plan", "flash"), 200),
        (("--plan", "posthoc"), 240),
        (("--plan", "none"), 240),
        (("--plan", "flash", "--guidance-scale", "4.5"), 400),
        (("--plan", "sd14", "--num-inference-steps", "50"), 1880),
        (("--plan.preset", "none", "--sampling.num-inference-steps", "20"), 480),
    ],
)
def test_plan_counts_network_calls(capsys, args, nfe):
    unguided = () if "--guidance-scale" in args else ("--guidance-scale", "1")
    assert json.loads(printed(capsys, "plan", "sd3", "--json", *unguided, *args))["nfe_per_prompt"] == nfe


@pytest.mark.parametrize("args", [("--plan.preset", "flash"), ("--plan.preset=flash",), ("--plan", "flash")])
def test_a_preset_takes_the_place_of_a_recipes_custom_plan(capsys, args):
    shown = json.loads(printed(capsys, "plan", "smoke", "--json", *args))
    assert shown["path"] == [24, 16, 12]
    for option in ("--plan.preset", "--plan"):
        own = json.loads(printed(capsys, "plan", "smoke", "--json", option, "custom"))
        assert own["path"] == [6, 4] and own["prune_steps"] == [3]
    new = json.loads(printed(capsys, "plan", "sd3", "--json", "--plan", "custom", "--plan.group_size", "24"))
    assert new["path"] == [24]


@pytest.mark.parametrize("args", [("--plan.preset", "flash"), ("--plan", "flash")])
def test_a_preset_keeps_what_is_not_of_a_custom_plan(capsys, tmp_path, args):
    file = tmp_path / "mine.json"
    file.write_text('{"plan": {"preset": "custom", "group_size": 6, "prune": [[1, 4]], "keep_groups": 4}}')
    assert json.loads(printed(capsys, "plan", str(file), "--json", *args))["groups"] == [12, 4]


def test_plan_prints_a_table(capsys):
    rows = dict(line.split(maxsplit=1) for line in printed(capsys, "plan", "smoke").splitlines())
    assert rows["recipe"] == "smoke" and rows["path"] == "6 4" and rows["nfe_per_prompt"] == str(6 * 4 + 4 * 2)


def test_plan_reads_a_config_file(capsys, tmp_path):
    file = tmp_path / "mine.json"
    file.write_text('{"recipe": "mine", "plan": {"preset": "posthoc"}}')
    assert json.loads(printed(capsys, "plan", str(file), "--json"))["path"] == [24, 12]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ("trian",),
            f"'trian' is no command of progrpo ({', '.join(COMMANDS)}); did you mean train?",
        ),
        (("train",), f"a recipe ({NAMES}), a config file or a run folder comes first"),
        (
            ("train", "--seed", "3", "smoke"),
            f"a recipe ({NAMES}), a config file or a run folder comes first",
        ),
        (
            ("plan", "smoky"),
            f"smoky is no recipe ({NAMES}), config file or run folder; did you mean smoke?",
        ),
        (
            ("train", "smoke", "--sampling.noise_levl", "0.5"),
            "progrpo train smoke does not take --sampling.noise_levl; did you mean --sampling.noise-level?",
        ),
        (("train", "smoke", "--noise_level=0.5"), "did you mean --sampling.noise-level?"),
        (("plan", "smoke", "--num-inference-stps", "3"), "did you mean --num-inference-steps?"),
        (("plan", "smoke", "stray"), "progrpo plan smoke does not take stray"),
        (("train", "smoke", "--sampling.noise_level", "0"), "sampling.noise_level must be above 0"),
        (("train", "smoke", "--iterations", "0"), "iterations must be at least 1, not 0"),
        (("plan", "smoke", "--num-inference-steps", "4"), "prune step 3 saves no network call"),
        (
            ("plan", "sd3", "--plan", "none", "--plan.group-size", "8"),
            "plan.group_size, plan.prune and plan.final_keep are read only when plan.preset is custom, not none",
        ),
        (("plan", "sd3", "--plan.group-size", "24"), "are read only when plan.preset is custom, not standard"),
        (("train", "smoke", "--plan.preset=late", "--plan.prune"), "read only when plan.preset is custom, not late"),
        (("plan", "sd3", "--plan=flash", "--plan.preset=none"), "--plan and --plan.preset name a plan each; leave one"),
        (("plan", "sd3", "--plan", "custom"), "--plan custom needs the plan: give --plan.group-size, --plan.prune or "),
        (("train", "sd3", "--plan.preset", "custom"), "--plan.preset custom needs the plan: give --plan.group-size"),
        (("plan", "smoke", "--plan.prune", "3", "9"), "prune keep at step 3 must be at most the 6 members"),
        (("train", "smoke", "--resume", "nowhere"), "progrpo train --resume does not take smoke"),
        (("train", "--resume", "nowhere", "--seed", "4"), "goes on by its own config.json: change it there, and add"),
        (("train", "--resume", "nowhere"), "nowhere is no run folder (it holds no config.json)"),
        (("sample", "m", "--prompt", "a", "--count", "0"), "--count must be between 1 and 10,000, not 0"),
        (("eval", "m", "--guidance-scale", "nan"), "--guidance-scale must be between 1 and 1,000, not nan"),
        (("report", "nowhere"), "nowhere is no run folder (it holds no config.json)"),
    ],
)
def test_mistakes_are_refused_in_one_sentence(capsys, args, message):
    assert message in refusal(capsys, *args)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("train", "smoke", "--sampling.noise_level", "high"), "--sampling.noise-level: no type matching {None}|FLOAT"),
        (("train", "smoke", "--optim.lr", "high"), "--optim.lr: 'high' is not a number (it is"),
        (("train", "smoke", "--seed", "1.5"), "--seed: '1.5' is not a whole number (it is"),
        (("train", "smoke", "--seed"), "--seed needs a value; see"),
        (("repro",), "one of fig1, fig2, fig5, table1, table2, table3, table4, table5, table6 is missing; see"),
        (("sample",), "MODEL is missing; see progrpo sample --help"),
        (("train", "smoke", "--plan.prune", "2"), "--plan.prune: '2' does not fit (it is --plan.prune [INT INT"),
        (("train", "smoke", "--sampling.sde-window", "al"), "invalid choice 'al' for argument '--sampling.sde-window'"),
        (
            ("train", "smoke", "--plan.selector", "ofv"),
            "plan.selector must be one of ovf, uniform, top_bottom, furthest, none",
        ),
        (
            ("plan", "smoke", "--plan", "flsh"),
            "plan.preset must be one of late, standard, flash, posthoc, none, sd14",
        ),
        (("pretrain", "shapes"), "shapes-flow"),
        (("sample", "shapes-flow"), "--prompt"),
    ],
)
def test_values_of_another_type_are_refused_by_name(capsys, args, message):
    assert message in refusal(capsys, *args)


def test_a_mistyped_run_is_refused_with_the_nearest(capsys, tmp_path):
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart" / "config.json").write_text("{}")
    assert f"did you mean {tmp_path / 'quickstart'}?" in refusal(capsys, "report", str(tmp_path / "quikstart"))
