"""flow_grpo's settings are read without being run, translated, and accounted for one by one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from progrpo.config import RewardTerm
from progrpo.imports.files import flatten
from progrpo.imports.flow_grpo.read import _bracketed, import_flow_grpo
from progrpo.imports.flow_grpo.rules import RULES
from progrpo.imports.outcome import STATUSES, Unread
from progrpo.imports.python_settings import read_settings
from progrpo.imports.translation import as_tables
from progrpo.recipes import RECIPES

BASE = """
import ml_collections

def get_config():
    config = ml_collections.ConfigDict()
    config.run_name, config.debug = "", True
    config.num_epochs = 500
    config.seed = 7
    config.save_freq = 20
    config.eval_freq = 20
    config.num_checkpoint_limit = 3
    config.mixed_precision = "bf16"
    config.use_lora = True
    config.resolution = 512
    config.pretrained = pretrained = ml_collections.ConfigDict()
    pretrained.model = "somebody/stable-diffusion-3.5"
    config.sample = sample = ml_collections.ConfigDict()
    sample.num_steps = 10
    sample.eval_num_steps = 40
    sample.guidance_scale = 4.5
    sample.eval_guidance_scale = 3.0
    sample.noise_level = 0.7
    sample.global_std = True
    sample.same_latent = False
    sample.sde_window_size = 2
    sample.sde_window_range = (0, 10)
    config.train = train = ml_collections.ConfigDict()
    train.learning_rate = 3e-4
    train.adam_beta1 = 0.9
    train.adam_beta2 = 0.99
    train.adam_epsilon = 1e-8
    train.num_inner_epochs = 1
    train.cfg = True
    train.clip_range = 1e-4
    train.adv_clip_max = 5
    train.timestep_fraction = 0.99
    train.beta = 0.0
    train.lora_path = None
    train.ema = False
    config.reward_fn = ml_collections.ConfigDict()
    config.per_prompt_stat_tracking = True
    return config
"""
MAIN = """
import imp, os
base = imp.load_source("base", os.path.join(os.path.dirname(__file__), "base.py"))

def common(gpu_number=8, folder="dataset/words"):
    config = base.get_config()
    config.dataset = os.path.join(os.getcwd(), folder)
    config.sample.train_batch_size = 6
    config.sample.num_image_per_prompt = 24
    prompts = gpu_number * config.sample.train_batch_size / config.sample.num_image_per_prompt
    config.sample.num_batches_per_epoch = int(48 / prompts)
    assert config.sample.num_batches_per_epoch % 2 == 0, "an even number"
    config.train.batch_size = config.sample.train_batch_size
    batches = config.sample.num_batches_per_epoch
    config.train.gradient_accumulation_steps = batches // 2 if batches > 1 else 1
    config.prompt_fn = "general_ocr"
    config.save_dir = f"logs/{config.seed}"
    config.reward_fn = {"ocr": 1.0}
    return config

"""


def written(folder: Path, body: str, base: str = BASE, main: str = MAIN) -> str:
    (folder / "config").mkdir(exist_ok=True)
    (folder / "config" / "base.py").write_text(base)
    (folder / "config" / "grpo.py").write_text(main + body)
    return str(folder / "config" / "grpo.py")


def task(folder: Path, *lines: str, name: str = "words", **options):
    body = "\n    ".join([f"def {name}():", "config = common()", *lines, "return config"])
    return import_flow_grpo(f"{written(folder, body)}:{name}", **options)


def statuses(translation) -> dict[str, str]:
    return {row.name: row.outcome.status for row in translation.rows}


def test_a_task_is_translated(tmp_path):
    lines = "config.train.beta = 0.04", "config.train.ema = True", "config.train.use_8bit_adam = True"
    config = task(tmp_path, *lines).config
    assert (config.iterations, config.seed, config.checkpoint.every, config.checkpoint.keep) == (500, 7, 20, 3)
    model = config.model
    assert (model.path, model.dtype, model.resolution) == ("somebody/stable-diffusion-3.5", "bfloat16", 512)
    published = RECIPES["sd35m-ocr"]()
    assert (model.lora_rank, model.lora_alpha, model.max_sequence_length) == (32, 64, 128)
    assert model.lora_targets == published.model.lora_targets and "attn.to_q" in model.lora_targets
    assert config.prompts.per_iteration == published.prompts.per_iteration == 48
    assert config.prompts.source == str(tmp_path / "dataset/words/train.txt")
    assert config.eval.prompts == str(tmp_path / "dataset/words/test.txt")
    assert (config.plan.preset, config.plan.group_size, config.plan.prune) == ("custom", 24, ())
    assert (config.sampling.microbatch, config.optim.microbatch, config.optim.updates_per_rollout) == (6, 6, 2)
    assert (config.sampling.num_inference_steps, config.sampling.guidance_scale) == (10, 4.5)
    assert (config.eval.num_inference_steps, config.eval.guidance_scale, config.eval.every) == (40, 4.5, 20)
    assert config.sampling.sde_window == "auto" and not config.sampling.train_last_step
    assert (config.objective.grpo.kl_beta, config.objective.grpo.kl_form) == (0.04, "flow_grpo")
    assert (config.objective.advantage, config.objective.grpo.clip_range) == ("batch", 1e-4)
    assert (config.optim.name, config.optim.lr, config.optim.betas) == ("adamw_8bit", 3e-4, (0.9, 0.99))
    # after every eighth update, of two an iteration, each of the 12 batches until the next takes a tenth
    assert config.optim.ema_decay == pytest.approx(0.9 ** (2 * 12 / 8), abs=1e-6)
    assert config.reward.terms == (RewardTerm("ocr"),)


def test_a_video_has_height_width_and_frames(tmp_path):
    translation = task(tmp_path, "config.height = 240", "config.width = 416", "config.frames = 33")
    assert (translation.config.model.resolution, translation.config.model.frames) == ((240, 416), 33)
    status = statuses(translation)
    assert status["height"] == status["width"] == status["frames"] == "translated"
    assert status["resolution"] == "not needed here"
    for side in ("height", "width"):
        translation = task(tmp_path, f"config.{side} = 240")
        assert statuses(translation)[side] == "no equal here" and translation.config.model.resolution == 512


def test_every_setting_ends_in_one_list(tmp_path):
    lines = ['config.train.new_one = "x"', "config.sample.kl_reward = 0.1", "config.seed = fetch()", "config.run()"]
    translation = task(tmp_path, *lines)
    names = Counter(row.name for row in translation.rows)
    read = _bracketed(flatten(read_settings(tmp_path / "config/grpo.py", "words").settings))
    assert set(read) <= set(names) and set(names) - set(read) == {
        *("gpu_number", "script", "script.lora_rank", "script.lora_alpha", "script.lora_targets"),
        *("script.model", "script.max_sequence_length", "script.eval_prompts", "a statement"),
    }
    assert set(names.values()) == {1}
    status = statuses(translation)
    assert set(status.values()) == set(STATUSES)
    assert status["train.new_one"] == status["sample.kl_reward"] == "no equal here"
    assert status["seed"] == status["a statement"] == "could not be read"
    assert translation.config.seed == 0  # and not the 7 that the base has
    printed = as_tables(translation)
    assert all(sum(line.split()[:1] == [n] for line in printed.splitlines()) == 1 for n in names if n != "a statement")
    lines = (tmp_path / "config/grpo.py").read_text().splitlines()
    assert f"grpo.py, line {lines.index('    config.seed = fetch()') + 1};" in printed


def test_a_window_is_read_by_the_fast_script(tmp_path):
    lines = (
        'config.sample.sde_type = "cps"',
        "config.sample.sde_window_size = 3",
        "config.sample.sde_window_range = (0, config.sample.num_steps // 2)",
        "config.train.beta = 0.1",
    )
    config = task(tmp_path, *lines).config
    assert (config.sampling.sde_window, config.sampling.sde_window_size, config.sampling.sde_window_end) == (
        "random",
        3,
        5,
    )
    assert config.sampling.sampler == "cps_reduced" and config.eval.guidance_scale == 3.0
    assert config.objective.grpo.kl_form == "exact"
    plain = task(tmp_path, *lines, script="plain").config
    assert plain.sampling.sde_window == "auto" and plain.eval.guidance_scale == 4.5
    of_base = task(tmp_path, script="fast")
    assert of_base.config.sampling.sde_window_end == 9  # of 10 steps, whose last is not trained


def test_the_guard_changes_the_ratio(tmp_path):
    grpo = task(tmp_path, name="words_rationorm").config.objective.grpo
    assert (grpo.ratio, grpo.step_weights) == ("guard", "inverse_h")


def test_flux_has_its_own_adapter_and_guidance(tmp_path):
    config = task(tmp_path, 'config.pretrained.model = "black-forest-labs/FLUX.1-dev"').config
    assert config.sampling.embedded_guidance and config.model.lora_rank == 64
    assert config.model.lora_targets == RECIPES["flux-pickscore"]().model.lora_targets


def test_rewards_are_weighed_and_unknown_ones_are_the_users(tmp_path):
    translation = task(tmp_path, 'config.reward_fn = {"pickscore": 0.5, "qwenvl": 2}', "config.use_lora = False")
    assert translation.config.reward.terms == (RewardTerm("pickscore", 0.5), RewardTerm("my_rewards:qwenvl", 2.0))
    assert statuses(translation)["reward_fn[qwenvl]"] == "no equal here"
    assert translation.config.model.weights == "full" and "script.lora_rank" not in statuses(translation)


def test_geneval_has_columns(tmp_path):
    config = task(tmp_path, 'config.prompt_fn = "geneval"', 'config.reward_fn = {"geneval": 1}').config
    assert config.prompts.source.endswith("words/train_metadata.jsonl")


def test_gpus_are_asked_for_where_the_file_is_silent(tmp_path):
    file = written(tmp_path, "", main=MAIN.replace("gpu_number", "many"))
    with pytest.raises(ValueError, match=r"does not say on how many GPUs it runs.* give --gpus"):
        import_flow_grpo(f"{file}:common")
    assert import_flow_grpo(f"{file}:common", gpus=4).config.prompts.per_iteration == 24


# --- reading without running ------------------------------------------------------------------------------------------


def read(folder: Path, *lines: str, top: str = ""):
    body = "\n    ".join(["def f():", "config = ml_collections.ConfigDict()", *lines, "return config"])
    return read_settings(Path(written(folder, top + "\n" + body)), "f")


def test_expressions_are_followed(tmp_path):
    script = read(
        tmp_path,
        "n = 4",
        "n += 2",
        "config.a = -n * 2 // 5 + 7 % 4",
        'config.b = [n, "x" + "y", (1.5, None)]',
        "config.c = 1 < n <= 6 and not n == 5",
        "config.d = max(n, 9) if n in (6, 7) else 0",
        "if n > 5 and MANY:",
        "    config.e = MANY",
        "else:",
        "    config.e = 0",
        'config["f"], m = config.b[1], n',
        'config.g = ml_collections.ConfigDict({"h": 1})',
        top="MANY = 3",
    )
    assert script.settings == {
        **{"a": -12 // 5 + 3, "b": [6, "xy", (1.5, None)], "c": True, "d": 9, "e": 3, "f": "xy"},
        "g": {"h": 1},
    }
    assert not script.unread


@pytest.mark.parametrize(
    "line",
    [
        "config.a = open('secret').read()",
        "config.a = __import__('os').system('true')",
        "config.a = [i for i in range(3)]",
        "config.a = 'x' * 10**9",
        "config.a = 2 ** 10000",
        "config.a = 9**99",
        "config.a = 1 / 0",
        "config.a = config.missing",
        "config.a = (lambda: 1)()",
        "config.a = int('x')",
        "config.a = eval('1')",
        "config.a = f'{1:>99999999}'",
        "config.a, config.b = divmod(7, 2)",
    ],
)
def test_what_cannot_be_followed_is_unread_with_its_line(tmp_path, line):
    script = read(tmp_path, "config.a = 1", line)
    line_number = (MAIN + "\n").count("\n") + 4
    assert isinstance(script.settings["a"], Unread) and script.settings["a"].line == line_number


def test_what_an_unknown_condition_sets_is_unread(tmp_path):
    script = read(
        tmp_path,
        "config.a = 1",
        "if os.environ.get('X'):",
        "    config.a = 2",
        "for i in range(3):",
        "    config.b = i",
    )
    assert isinstance(script.settings["a"], Unread) and isinstance(script.settings["b"], Unread)
    assert len(script.unread) == 2


def test_what_a_file_changes_before_its_functions_is_followed(tmp_path):
    top = [
        *["A = 1", "A *= 3", "B: int = 4", "C = 5", "if A > 2:", "    C = 6"],
        *["D, E, F = 7, 8, 9", "for D in range(3):", "    pass", "with open('x') as x:", "    E = 1", "del F"],
        *["G = 10", "if __name__ == '__main__':", "    G = 11", "print(G)"],
    ]
    script = read(tmp_path, *[f"config.{name.lower()} = {name}" for name in "ABCDEFG"], top="\n".join(top))
    known = {name: value for name, value in script.settings.items() if not isinstance(value, Unread)}
    assert known == {"a": 3, "b": 4, "c": 6, "g": 10}
    assert [unread.text for unread in script.unread] == ["for D in range(3):", "with open('x') as x:", "del F"]


@pytest.mark.parametrize(
    "line",
    [
        "del config.a",
        "for config.a in range(3): pass",
        "with open('x') as config.a: pass",
        "config.b = open(n := 5); config.a = n",
        "if open(n := 5): pass\n    config.a = n",
    ],
)
def test_what_is_assigned_in_passing_is_unread(tmp_path, line):
    assert isinstance(read(tmp_path, "n = 1", "config.a = 2", line).settings["a"], Unread)


@pytest.mark.parametrize(
    "body",
    [
        "def f():\n    return f()",
        "def f():\n    return {'a': f(), 'b': f()}",
        "def g():\n    return h()\ndef h():\n    return g()\ndef f():\n    return g()",
        "def f():\n    return 3",
        "def f():\n    c = ml_collections.ConfigDict()\n    c.a = c\n    return c",
        "def f():\n    return " + "(" * 150 + "1" + ")" * 150,
        "def f():\n    return " + "-" * 5000 + "1",
        "def f(:",
        "\0",
        "def g():\n    return {}",
        "return\ndef f():\n    return 3",
        "".join(f"def f{i}():\n    return {{'a': f{i - 1}(), 'b': f{i - 1}()}}\n" for i in range(1, 60))
        + "def f():\n    return f59()",
    ],
)
def test_a_file_that_is_no_settings_is_refused_in_one_sentence(tmp_path, body):
    with pytest.raises(ValueError) as refused:
        import_flow_grpo(f"{written(tmp_path, body)}:f", gpus=1)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600


@pytest.mark.parametrize("use", ["f'{a}'", "str(a)", "a == b", "max(a, b)", "{a: 1}", "{}[a]", "a"])
def test_what_is_shared_a_hundredfold_takes_no_time(tmp_path, use):
    lines = ["a, b = (1, 2), (1, 2)", *["a, b = (a, a), (b, b)"] * 60, f"config.shared = {use}"]
    with pytest.raises(ValueError, match="are more than 10,000 settings" if use == "a" else "does not return settings"):
        task(tmp_path, *lines)


def test_a_base_that_importlib_loads_is_read(tmp_path):
    loaded = 'spec = importlib.util.spec_from_file_location("base", os.path.join(os.path.dirname(__file__), "base.py"))'
    main = MAIN.replace(MAIN.splitlines()[2], f"{loaded}\nbase = importlib.util.module_from_spec(spec)")
    assert import_flow_grpo(f"{written(tmp_path, '', main=main)}:common").config.seed == 7


def test_a_base_that_a_function_of_the_file_loads_is_read(tmp_path):
    load = """
import importlib.util, os

def _load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

base = _load("base", path=os.path.join(os.path.dirname(__file__), "base.py"))
"""
    start = 'import imp, os\nbase = imp.load_source("base", os.path.join(os.path.dirname(__file__), "base.py"))\n'
    assert start in MAIN
    body = "def words():\n    config = common(16)\n    return config\n"
    translation = import_flow_grpo(f"{written(tmp_path, body, main=MAIN.replace(start, load))}:words")
    assert translation.config.seed == 7 and "could not be read" not in statuses(translation).values()
    assert translation.config.prompts.per_iteration == 48  # of 16 GPUs, by the function's argument


def test_an_argument_that_a_function_does_not_take_is_not_followed(tmp_path):
    for call in ("common(1, 2, 3)", "common(gpus=1)", "common(**{})"):
        with pytest.raises(ValueError, match="does not return settings"):
            import_flow_grpo(f"{written(tmp_path, f'def words():{chr(10)}    return {call}{chr(10)}')}:words")


def test_an_algorithm_is_refused_before_its_other_settings(tmp_path):
    with pytest.raises(ValueError, match=r"train\.algorithm 'sft' has no equal here"):
        task(tmp_path, "config.train.gradient_accumulation_steps = 0", "config.train.algorithm = 'sft'")


def test_a_file_elsewhere_is_not_loaded(tmp_path):
    (tmp_path / "other.py").write_text(BASE)
    main = MAIN.replace('os.path.dirname(__file__), "base.py"', f'"{tmp_path}", "other.py"')
    with pytest.raises(ValueError, match="common does not return settings"):
        import_flow_grpo(f"{written(tmp_path, '', main=main)}:common")


def test_a_name_is_asked_for(tmp_path):
    file = written(tmp_path, "def words():\n    return common()")
    with pytest.raises(ValueError, match=r"has several settings; say which: .*:NAME, of common, words"):
        import_flow_grpo(file)
    with pytest.raises(ValueError, match="has no function wrds without arguments; it has common, words"):
        import_flow_grpo(f"{file}:wrds")
    with pytest.raises(ValueError, match=r"gone\.py is no file; give the path of the settings"):
        import_flow_grpo(str(tmp_path / "gone.py"))


JUNK = ("None", "True", "-1", "0", "1e400", "2.5", "10**9", '"text"', "[]", "{}", "(1, 2)", "{'a': 1}", '"\\n"')


def test_nonsense_is_translated_or_refused_in_one_sentence(tmp_path):
    """Every setting that has a rule, one after the other."""
    names = [name for name in RULES if not name.startswith("script") and name not in ("gpu_number", "reward_fn[]")]
    cases = [(name, JUNK[i % len(JUNK)]) for i, name in enumerate(names)]
    functions = [
        f"def f{i}():\n    config = common()\n    config.{n} = {junk}\n    return config"
        for i, (n, junk) in enumerate(cases)
    ]
    file = written(tmp_path, "\n".join(functions))
    for i, case in enumerate(cases):
        try:
            import_flow_grpo(f"{file}:f{i}", script="fast" if i % 2 else "auto")
        except ValueError as refused:
            assert "\n" not in str(refused) and len(str(refused)) < 600, case
