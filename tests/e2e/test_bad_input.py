"""Mistakes of users: `progrpo: error:`, one sentence that names the mistake, exit code 2, and no files left behind."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from progrpo.cli import main
from progrpo.cli.options import sentence_of_box
from progrpo.config import config_to_json
from progrpo.policies.load import load_policy
from progrpo.policies.settings import ModelSettings
from progrpo.prompts.load import load_prompts
from progrpo.recipes import load_recipe
from progrpo.zoo import WEIGHTS

IN_QUOTES = "a value with spaces, such as a path, must stand in quotes:"
WEIGHTS_OF = "{}/diffusion_pytorch_model.safetensors"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder, with the files that are wrong in some way."""
    monkeypatch.chdir(tmp_path)
    config = config_to_json(load_recipe("smoke"))
    (tmp_path / "cut.json").write_text(config[: len(config) // 2])
    (tmp_path / "twice.json").write_text('{"seed": 1, "seed": 2}')
    (tmp_path / "utf16.json").write_bytes(config.encode("utf-16"))
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "utf16.txt").write_bytes("a cat\na dog\n".encode("utf-16"))
    (tmp_path / "nul.txt").write_bytes(b"a cat\na \0 dog\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a cat"}\n{"text": "a dog"}\n')
    (tmp_path / "taken.jsonl").write_text('{"prompt": "a cat"}\n{"prompt": "a dog", "images": 2}\n')
    with (tmp_path / "long.txt").open("wb") as file:
        file.truncate(4 * 2**30)  # a line of four gigabytes, without any on the disk
    return tmp_path


def refusal(*words, timeout=60):
    """The sentence of a refused command, run as a user runs it. It leaves nothing in the current folder."""
    before = sorted(Path.cwd().rglob("*"))
    done = subprocess.run([sys.executable, "-m", "progrpo", *words], capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 2 and done.stdout == "", done.stderr
    assert done.stderr.startswith("progrpo: error: ") and done.stderr.count("\n") == 1, done.stderr
    assert sorted(Path.cwd().rglob("*")) == before
    return done.stderr.removeprefix("progrpo: error: ").rstrip("\n")


def refusal_in_process(capsys, *words):
    """The same within this process, where what a process adds (what libraries print as they load) is not the matter."""
    before = sorted(Path.cwd().rglob("*"))
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("progrpo: error: ") and err.count("\n") == 1, err
    assert sorted(Path.cwd().rglob("*")) == before
    return err.removeprefix("progrpo: error: ").rstrip("\n")


def test_a_process_says_its_sentence_and_nothing_else(here):
    assert "'trian' is no command of progrpo" in refusal("trian")
    assert "utf16.json: not UTF-8 text; save the file as UTF-8" in refusal("plan", "utf16.json")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("a\nb",), "'a\\nb' is no command of progrpo"),
        (("train", "x" * 5000), "is no recipe"),
        (("train", "smoke", "--optim.lr", "high"), "--optim.lr: 'high' is not a number"),
        (("train", "smoke", "--plan.prune", "3"), "--plan.prune"),
        (("plan", "smoke", "--reward.terms", '{"nme": "ocr"}'), "reward.terms.nme is not a field"),
        (
            ("plan", "smoke", "--reward.terms", '{"name": "ocr", "foo": 1}'),
            "reward.terms.foo is not a field; a reward has name,",
        ),
        (
            ("plan", "smoke", "--reward.terms", "0*ocr", "0*shapes"),
            "reward.terms: every weight is 0, so that nothing is",
        ),
        (
            ("plan", "smoke", "--gpu", "foo"),
            "Expected one of ('a100-40gb', 'a100-80gb', 'a6000', 'h100', 'h200', 'l4', 'l40s',",
        ),
        (("plan", "cut.json"), "cut.json: not JSON, as a configuration must be"),
        (
            ("plan", "twice.json"),
            "twice.json: not JSON, as a configuration must be: seed is given twice; leave one out",
        ),
        (
            ("plan", "deep.json"),
            "deep.json: not JSON, as a configuration must be: lists or objects are nested without end",
        ),
        (("report", "."), ". is no run folder"),
        (("sample", "shapes-flow", "--prompt", "a", "--limit", "5"), "--limit goes with --prompts; every --prompt is"),
        (("train", "smoke", "--out", ""), "a path is empty (''); give one, or . for the current folder"),
    ],
)
def test_what_is_refused_in_a_sentence(here, capsys, words, sentence):
    assert sentence in refusal_in_process(capsys, *words)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            "train smoke --model.compile True",
            "--model.compile takes no value, so leave out True: --model.compile alone turns it on, --model.no-compile",
        ),
        ("plan smoke --model.compile=False", "--model.compile takes no value, so leave out False: "),
        (
            "train smoke --overwrite true",
            "--overwrite takes no value, so leave out true: --overwrite alone turns it on, with",
        ),
        ("eval shapes-flow --json 1", "a second model, 1, goes with --suite; give that too, or leave it out (a flag,"),
        ("train smoke --out a run", f"does not take run; {IN_QUOTES} --out 'a run'"),
        ("train smoke --out=my own run", f"does not take own; {IN_QUOTES} --out 'my own run'"),
        ("sample my model --prompt x", f"progrpo sample does not take model; {IN_QUOTES} 'my model'"),
        ("train my recipe.json", "a path with spaces must stand in quotes: progrpo train 'my recipe.json' ..."),
        ("plan smoke --model.compil", "does not take --model.compil; did you mean --model.compile?"),
    ],
)
def test_values_of_flags_and_paths_in_pieces_are_said_to_be_that(here, capsys, words, sentence):
    (here / "my recipe.json").write_text("{}")
    assert main(words.split()) == 2
    assert sentence in capsys.readouterr().err


def test_what_is_refused_with_torch(here, capsys):
    wrong = ["--prompts.source", "utf16.txt", "--out", "run"]
    sentence = refusal_in_process(capsys, "train", "smoke", *wrong)
    assert "utf16.txt, line 1: not UTF-8 text but UTF-16; save the file as UTF-8" in sentence
    split = ["--prompts", "rows.jsonl", "--split", "validation"]
    sentence = refusal_in_process(capsys, "eval", "shapes-flow", *split)
    assert "--split: the prompt file rows.jsonl has no splits; leave it out" in sentence
    shutil.copytree(WEIGHTS / "shapes-flow", "model")
    whole = Path("model", WEIGHTS_OF.format("transformer"))
    whole.write_bytes(whole.read_bytes()[:-1000])
    assert "model.path: cannot load model" in refusal(
        "sample", "model", "--prompt", "a red circle", "--out", "pictures"
    )


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nul.txt", "nul.txt, line 2: not UTF-8 text"),
        ("rows.jsonl", "rows.jsonl, line 2: has no field named prompt, only text"),
        (
            "taken.jsonl",
            "taken.jsonl, line 2: no column can be called images: under that name a reward receives pictures; rename",
        ),
        ("long.txt", "long.txt, line 1: over 1 MB long; write one prompt per line"),
        (".", "prompts must come from"),
        ("x" * 300 + ".txt", "no prompt file"),
        ("a\0b.txt", "no prompt file 'a\\x00b.txt'"),
    ],
)
def test_prompt_files_are_refused_by_line(here, name, sentence):
    with pytest.raises(ValueError) as refused:
        load_prompts(name)
    assert sentence in str(refused.value) and str(refused.value).isprintable()


@pytest.mark.parametrize(
    ("name", "near"), [("prompt.txt", "prompts.txt"), ("p.yaml", ""), (".", ""), ("shape", "shapes")]
)
def test_a_prompt_file_is_suggested_by_its_name_and_not_by_its_folder(tmp_path, monkeypatch, name, near):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a circle\n")
    (tmp_path.parent / "other.txt").write_text("a circle\n")
    for source in (name, str(tmp_path / name)):  # a run makes paths of prompt files absolute
        with pytest.raises(ValueError) as refused:
            load_prompts(source)
        assert str(refused.value).partition("; did you mean ")[2].rstrip("?").endswith(near)
        assert ("did you mean" in str(refused.value)) == bool(near)


def test_files_that_are_not_ours_to_read_are_said_to_be(here):
    here.chmod(0o755)
    shutil.copy("twice.json", "mine.json")
    for name in ("nul.txt", "mine.json"):
        Path(name).chmod(0)
    own = os.geteuid()
    if own == 0:
        os.seteuid(65534)  # root may read anything
    try:
        with pytest.raises(ValueError, match=r"^the prompt file nul.txt cannot be read: Permission denied"):
            load_prompts("nul.txt")
        with pytest.raises(ValueError, match=r"^mine.json cannot be read: Permission denied$"):
            load_recipe("mine.json")
    finally:
        os.seteuid(own)


def edited(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: (folder / "model_index.json").unlink(), "has no model_index.json"),
        (lambda folder: edited(folder / "model_index.json", _class_name="NobodysPipeline"), "is a NobodysPipeline;"),
        (lambda folder: edited(folder / "model_index.json", vae=["os", "system"]), "cannot load"),
        (lambda folder: edited(folder / "transformer/config.json", num_layers=9), "cannot load"),
        (lambda folder: (folder / "vae/config.json").write_text("[]"), "holds no object of named settings"),
        (lambda folder: shutil.rmtree(folder / "tokenizer"), "tokenizer holds none of"),
        (
            lambda folder: lose(folder / "text_encoder/model.safetensors", "final_layer_norm.bias"),
            "its config.json asks",
        ),
        (lambda folder: lose(folder / WEIGHTS_OF.format("transformer"), "proj_out.weight"), "its config.json asks for"),
    ],
)
def test_damaged_models_are_refused_and_nothing_is_made_up_for_what_is_missing(tmp_path, damage, sentence):
    folder = tmp_path / "model"
    shutil.copytree(WEIGHTS / "shapes-flow", folder)
    damage(folder)
    with pytest.raises(ValueError) as refused:
        load_policy(ModelSettings(str(folder), lora_rank=2))
    assert sentence in str(refused.value) and str(folder) in str(refused.value) and str(refused.value).isprintable()


def lose(file: Path, tensor: str) -> None:
    from safetensors.torch import load_file, save_file

    whole = load_file(file)
    kept = {name: value for name, value in whole.items() if not name.endswith(tensor)}
    assert len(kept) == len(whole) - 1
    save_file(kept, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The saved policies of both built-in models, as folders by (model, kind of weights)."""
    folder = tmp_path_factory.mktemp("trained")
    folders = {}
    for model in ("shapes-flow", "shapes-diffusion"):
        for weights in ("lora", "full"):
            folders[model, weights] = folder / f"{model}-{weights}"
            load_policy(ModelSettings(str(model), weights=weights, lora_rank=2)).save(folders[model, weights])
    return folders


@pytest.mark.parametrize("weights", ["lora", "full"])
@pytest.mark.parametrize("model", ["shapes-flow", "shapes-diffusion"])
def test_trained_weights_of_another_model_are_refused(trained, model, weights):
    other = {"shapes-flow": "shapes-diffusion", "shapes-diffusion": "shapes-flow"}[model]
    load_policy(ModelSettings(str(model), lora_rank=2), trained=trained[model, weights])
    with pytest.raises(ValueError, match=r"; it is of another$|and this model has a "):
        load_policy(ModelSettings(str(model), lora_rank=2), trained=trained[other, weights])


def test_half_a_lora_is_refused(trained, tmp_path):
    folder = tmp_path / "half"
    shutil.copytree(trained["shapes-flow", "lora"], folder)
    lose(folder / "pytorch_lora_weights.safetensors", "transformer_blocks.1.attn.to_q.lora_B.weight")
    with pytest.raises(ValueError, match=r"^cannot use the LoRA .*half: its .*1.attn.to_q has one of two matrices"):
        load_policy(ModelSettings("shapes-flow", lora_rank=2), trained=folder)


def test_an_evaluation_whose_reward_cannot_read_the_prompts_is_refused_before_a_picture_is_drawn(here, capsys):
    (here / "cats.txt").write_text("a cat")
    (here / "my_held_out.py").write_text("def score(images, prompts, target): return target")
    words = ["eval", "no-such-folder", "--prompts", "cats.txt"]  # which would be missed as soon as it is to be loaded
    assert main(words) == 2
    assert "the reward `shapes` cannot read the prompt 'a cat'" in capsys.readouterr().err
    assert main([*words, "--reward", "my_held_out:score"]) == 2
    assert "takes 'target', but the prompt 'a cat' has no column" in capsys.readouterr().err


# --- a stranger's run folder ------------------------------------------------------------------------------------------


@pytest.fixture
def strangers(here):
    """A run folder whose reward is a module beside it, which would leave a file when imported."""
    run = here / "run"
    run.mkdir()
    (here / "theirs.py").write_text(
        'open("imported", "w").close()\ndef reward(images, prompts): return [0.0] * len(images)\n'
    )
    (run / "config.json").write_text(json.dumps({"reward": {"terms": ["theirs:reward"]}, "recipe": "theirs"}))
    (run / "summary.json").write_text("{}")
    return run


@pytest.mark.parametrize("words", [("report", "run"), ("plan", "run"), ("recipes", "run"), ("compare", "run", "other")])
def test_looking_at_a_strangers_run_runs_nothing_of_it(strangers, words):
    shutil.copytree(strangers, strangers.with_name("other"))
    assert main(list(words)) == 0
    assert not Path("imported").exists()


@pytest.mark.parametrize(
    "term", ["theirs:reward", {"name": "ocr", "url": "http://127.0.0.1:9"}, {"name": "shapes", "cache": "scores"}]
)
@pytest.mark.parametrize("held_out", [False, True])
def test_a_strangers_reward_is_asked_only_by_name(strangers, capsys, term, held_out):
    parts = {"eval": {"rewards": [term]}} if held_out else {"reward": {"terms": [term]}}
    (strangers / "config.json").write_text(json.dumps(parts))
    assert main(["eval", "run", "--pictures", "2"]) == 2
    said = capsys.readouterr().err
    name, own = ("measure by it if you trust it,", "progrpo eval run --reward shapes") if held_out else ("name it:", "")
    assert f"{name} progrpo eval run --reward " in said and own in said
    assert not Path("imported").exists() and not Path("scores").exists()


def test_the_command_that_trusts_a_runs_own_rewards_can_be_pasted(strangers, capsys, monkeypatch):
    Path("my runs").mkdir()
    strangers.rename("my runs/a")
    terms = ["-0.5*theirs:reward", {"name": "jpeg_compressibility", "retries": 0}]
    Path("my runs/a/config.json").write_text(json.dumps({"reward": {"terms": terms}}))
    assert main(["eval", "my runs/a"]) == 2
    words = shlex.split(capsys.readouterr().err.rpartition("name it: ")[2])
    assert words[:3] == ["progrpo", "eval", "my runs/a"] and not Path("imported").exists()
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(words[1:]) == 2
    assert "has saved no trained weights yet" in capsys.readouterr().err  # the rewards were taken, and all but that
    assert Path("imported").exists()


@pytest.mark.parametrize("choices", ["'None', 'b', 'a'", "'b', 'None', 'a'", "'b', 'a', 'None'"])
def test_choices_come_in_one_order_wherever_their_set_has_none(choices):
    box = f"╭─ Parsing error ─╮\n│ Expected one of ({choices}), not 'c'. │\n╰─────────────────╯\n"
    assert sentence_of_box(box) == "Expected one of ('a', 'b'), not 'c'"
