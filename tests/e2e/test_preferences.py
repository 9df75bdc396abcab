"""From a pairs file to a trained model by the command line."""

import json

import numpy as np
import pytest
from PIL import Image

from progrpo.cli import main
from progrpo.preferences.pairs import Pair, write_pairs
from progrpo.zoo.shapes import world
from progrpo.zoo.shapes.taste import taste

SHORT = ("--iterations", "1", "--eval.pictures", "4", "--audit.every", "0")


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    prompts, pictures = world.examples("train", 80, seed=4)
    values = taste(pictures)
    paths = [folder / f"{i}.png" for i in range(80)]
    for path, picture in zip(paths, pictures, strict=True):
        Image.fromarray(picture).save(path)
    rows = range(0, 80, 2)
    pairs = [Pair(prompts[i], paths[i], paths[i + 1], float(values[i] > values[i + 1])) for i in rows]
    write_pairs(folder / "pairs.jsonl", pairs)
    return folder / "pairs.jsonl"


def test_from_pairs_to_a_reward_and_a_run(pairs_file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        main(["reward-model", "train", str(pairs_file), "--out", "taste", "--members", "3", "--label-noise", "0"]) == 0
    )
    shown = capsys.readouterr()
    assert "held out: accuracy" in shown.out
    assert "fitting 3 heads" in shown.err
    assert main(["reward-model", "eval", "taste", str(pairs_file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] > 0.8
    learned, variance = ({"name": name, "model": "taste"} for name in ("reward_model", "reward_model_variance"))
    terms = [json.dumps(learned), json.dumps({**variance, "weight": -0.5})]
    assert main(["train", "smoke", "--reward.terms", *terms, "--out", "run", *SHORT]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["reward"]["terms"][0]["model"] == str(tmp_path / "taste")
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("reward_model_variance" in json.dumps(row) for row in metrics)
    capsys.readouterr()
    assert main(["eval", "run", "--reward", json.dumps(learned), "--pictures", "4", "--json"]) == 0
    assert np.isfinite(json.loads(capsys.readouterr().out)["graded"])


def test_wrong_options_and_files_are_sentences(pairs_file, tmp_path, capsys):
    def error(*words):
        assert main(["reward-model", *words]) == 2
        return capsys.readouterr().err

    train = ("train", str(pairs_file), "--out", str(tmp_path / "out"))
    assert "--held-out must be a share" in error(*train, "--held-out", "1.5")
    assert "--label-noise must be auto" in error(*train, "--label-noise", "half")
    assert "--members must be between" in error(*train, "--members", "0")
    assert "a LoRA tunes a CLIP" in error(*train, "--lora-rank", "4")
    assert "no pairs file" in error(*train, "--held-out", "nothing.jsonl")
    assert "is no reward model" in error("eval", str(tmp_path), str(pairs_file))
    bad = pairs_file.with_name("bad.jsonl")
    bad.write_text(pairs_file.read_text() + '{"prompt": "a cat"}\nno json\n')
    shown = error("train", str(bad), "--out", str(tmp_path / "out"))
    assert "line 41: " in shown
    assert "line 42: " in shown
    assert not (tmp_path / "out").exists()
