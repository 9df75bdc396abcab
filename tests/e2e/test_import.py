"""`progrpo import`: what it writes is trained as it stands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from progrpo.cli import main
from progrpo.recipes import load_recipe

SETTINGS = """
import ml_collections

def tiny():
    gpu_number = 1
    config = ml_collections.ConfigDict()
    config.pretrained = ml_collections.ConfigDict({"model": "shapes-flow"})
    config.num_epochs, config.seed, config.use_lora = 1, 5, True
    config.mixed_precision, config.resolution = "no", 64
    config.dataset, config.prompt_fn = "FOLDER", "general_ocr"
    config.reward_fn = {"jpeg_compressibility": 1}
    config.sample = sample = ml_collections.ConfigDict()
    sample.num_steps, sample.eval_num_steps, sample.guidance_scale = 3, 2, 1.0
    sample.train_batch_size, sample.num_image_per_prompt, sample.num_batches_per_epoch = 4, 4, 2
    config.train = train = ml_collections.ConfigDict()
    train.batch_size, train.gradient_accumulation_steps, train.learning_rate = 4, 2, 1e-4
    train.beta, train.timestep_fraction = 0.01, 0.99
    return config
"""


@pytest.fixture
def file(tmp_path):
    for name in ("train", "test"):
        (tmp_path / f"{name}.txt").write_text("a red circle\na blue square\n")
    (tmp_path / "mine.py").write_text(SETTINGS.replace("FOLDER", str(tmp_path)))
    return str(tmp_path / "mine.py")


def test_what_is_written_trains(file, tmp_path, capsys):
    out = tmp_path / "mine.json"
    assert main(["import", "flow_grpo", file, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == f"{out} is written: progrpo train {out}"
    assert "translated (" in printed and "could not be read" not in printed
    config = load_recipe(str(out))
    assert (config.recipe, config.seed, config.plan.group_size, config.prompts.per_iteration) == ("mine", 5, 4, 2)
    run = tmp_path / "run"
    assert main(["train", str(out), "--out", str(run), "--eval.pictures", "2", "--audit.every", "0"]) == 0
    assert json.loads((run / "summary.json").read_text())["iterations"] == 1


def test_a_file_that_is_there_is_not_overwritten(file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["import", "flow_grpo", f"{file}:tiny"]) == 0
    assert load_recipe("tiny.json").recipe == "tiny"
    capsys.readouterr()
    assert main(["import", "flow_grpo", f"{file}:tiny"]) == 2
    assert "tiny.json is already there; give another --out, or --overwrite" in capsys.readouterr().err
    assert main(["import", "flow_grpo", f"{file}:tiny", "--overwrite"]) == 0


@pytest.mark.parametrize("framework", ["flow_grpo", "flow-grpo"])
def test_flow_grpos_name_is_read_as_package_and_as_repository(file, tmp_path, framework):
    assert main(["import", framework, file, "--out", str(tmp_path / "mine.json")]) == 0


@pytest.mark.parametrize("framework", ["flow_factory", "flow-factory"])
def test_flow_factorys_name_is_read_as_package_and_as_repository(tmp_path, monkeypatch, framework):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("train: {group_size: 4}\nrewards: {reward_model: PickScore}\n")
    assert main(["import", framework, "mine.yaml"]) == 0
    assert load_recipe("mine.json").plan.group_size == 4


@pytest.mark.parametrize("framework", ["verl-omni", "verl_omni"])
def test_a_script_of_verl_omni_is_imported(tmp_path, monkeypatch, framework):
    monkeypatch.chdir(tmp_path)
    overrides = "actor_rollout_ref.rollout.n=4 data.train_files=prompts.parquet trainer.total_training_steps=3"
    Path("mine.sh").write_text(f'python3 -m verl_omni.trainer.main_diffusion {overrides} "$@"\n')
    assert main(["import", framework, "mine.sh"]) == 0
    config = load_recipe("mine.json")
    assert (config.plan.group_size, config.iterations, config.recipe) == (4, 3, "mine")


def test_a_file_of_unirl_is_imported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(
        "defaults: [base]\nsampling: {samples_per_prompt: 4}\n"
        "algorithm: {_target_: unirl.algorithms.flowgrpo.FlowGRPO}\n"
    )
    Path("base.yaml").write_text(
        "bundle: {_target_: unirl.models.sd3.bundle.SD3Bundle.from_config}\nsampling: {num_inference_steps: 6}\n"
    )
    assert main(["import", "unirl", "mine.yaml"]) == 0
    config = load_recipe("mine.json")
    assert (config.plan.group_size, config.sampling.num_inference_steps) == (4, 6)


def test_options_of_the_other_framework_are_refused(capsys):
    assert main(["import", "flow-factory", "mine.yaml", "--gpus", "8"]) == 2
    assert "--gpus and --script are options of flow_grpo, not of flow-factory" in capsys.readouterr().err


def test_it_needs_no_torch(file, tmp_path):
    script = "import sys; from progrpo.cli import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    arguments = ["import", "flow_grpo", file, "--out", str(tmp_path / "mine.json")]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, capture_output=True)
