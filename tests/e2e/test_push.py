"""The folder that `progrpo push` makes of a run, and the files that reach the hub: here a server of this machine."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import progrpo
from progrpo.cli import main
from tests.support.run_folders import written_run

EVIL = "red cat: `x` ```\n---\n| <b>a</b> [b](c) # *d* \"e\" 'f' {{g}} \u05e9\u05dc\u05d5\u05dd"
ASKED = ["--base-model", "owner/base", "--license", "mit"]


@pytest.fixture
def trained(tiny_pipeline: Any, tiny_config: Any, redness: Any, tmp_path: Path) -> Path:
    out = tmp_path / "run"
    progrpo.train(tiny_pipeline(), [EVIL, "blue dog", "green bird"], redness, config=tiny_config(iterations=1), out=out)
    return out


def test_the_folder_has_a_card_whose_program_draws(trained, tiny_sd3, tmp_path, monkeypatch):
    from huggingface_hub import ModelCard

    out = tmp_path / "repository"
    assert main(["push", str(trained), "me/red", "--dry-run", str(out), *ASKED]) == 0
    names = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    assert {"README.md", "config.json", "pytorch_lora_weights.safetensors", "images/before_after.png"} <= names
    card = ModelCard.load(out / "README.md")
    facts = card.data.to_dict()
    assert facts["base_model"] == "owner/base" and facts["base_model_relation"] == "adapter"
    assert (facts["license"], facts["library_name"], facts["pipeline_tag"]) == ("mit", "diffusers", "text-to-image")
    assert {"text-to-image", "lora", "diffusers", "progrpo"} <= set(facts["tags"])
    shown = {example["text"]: example["output"]["url"] for example in facts["widget"]}
    assert EVIL in shown and all((out / file).is_file() for file in shown.values())
    assert "<b>" not in card.text.partition("```")[0] and "\n---\n" not in card.text.replace("| --- |", "")
    fence = "`" * (4 if "````" in card.text else 3)
    program = card.text.partition(f"{fence}python\n")[2].partition(f"\n{fence}\n")[0]
    program = program.replace("'owner/base'", repr(str(tiny_sd3))).replace("'me/red'", repr(str(out)))
    monkeypatch.chdir(tmp_path)
    compiled: Any = {}
    exec(program, compiled)
    assert Image.open(tmp_path / "result.png").size == (16, 16)
    assert str(tmp_path) not in (out / "config.json").read_text()


def test_full_weights_and_built_in_models_say_what_loads_them(tmp_path, capsys):
    run = written_run(tmp_path / "run", "word")
    run.log_config({"recipe": "r", "seed": 0, "model": {"path": "shapes-flow"}, "optim": {"lr": 1e-4}})
    assert main(["push", str(run.path), "me/x", "--dry-run", str(tmp_path / "out")]) == 2
    assert "has saved no trained weights yet" in capsys.readouterr().err
    (run.path / "transformer").mkdir()
    (run.path / "transformer/diffusion_pytorch_model.safetensors").write_bytes(b"x")
    assert main(["push", str(run.path), "me/x", "--dry-run", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out/README.md").read_text()
    assert "progrpo sample model --prompt" in card and "base_model" not in card and "license: apache-2.0" in card
    assert (tmp_path / "out/transformer/diffusion_pytorch_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["me/a/b", *ASKED], "is no name of a repository"),
        (["me/red", "--license", "mit"], "give its id there with --base-model"),
        (["me/red", "--base-model", "owner/base"], "give it with --license"),
    ],
)
def test_what_cannot_be_known_is_asked_for_in_a_sentence(tmp_path, capsys, monkeypatch, args, words):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    run = written_run(tmp_path / "run", "word")
    run.log_config({"recipe": "r", "seed": 0, "model": {"path": str(tmp_path / "model")}, "optim": {"lr": 1e-4}})
    (run.path / "lora").mkdir()
    (run.path / "lora/pytorch_lora_weights.safetensors").write_bytes(b"x")
    assert main(["push", str(run.path), *args, "--dry-run", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


def test_the_id_of_a_single_file_is_asked_for(tmp_path, capsys):
    run = written_run(tmp_path / "run", "word")
    model = {"path": "owner/base", "single_file": "/somewhere/tuned.safetensors"}
    run.log_config({"recipe": "r", "seed": 0, "model": model, "optim": {"lr": 1e-4}})
    (run.path / "lora").mkdir()
    (run.path / "lora/pytorch_lora_weights.safetensors").write_bytes(b"x")
    asked = ["push", str(run.path), "me/x", "--license", "mit", "--dry-run", str(tmp_path / "out")]
    assert main(asked) == 2
    assert "trained /somewhere/tuned.safetensors, which the hub does not know" in capsys.readouterr().err
    assert main([*asked, "--base-model", "owner/tuned"]) == 0
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model"] == {"path": "owner/tuned", "single_file": ""}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A server that speaks what a push needs, and what it was sent by path. `status` is its answer to a new name."""
    seen: dict[str, Any] = {"status": 200}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            seen[self.path] = body
            here = f"http://{self.headers['Host']}/me/red"
            answer: Any = {"url": here, "warnings": [], "errors": []}
            if "preupload" in self.path:
                files = json.loads(body)["files"]
                answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            if "commit" in self.path:
                answer = {"commitUrl": f"{here}/commit/1", "commitOid": "1", "pullRequestUrl": None}
            self.send_response(seen["status"] if self.path.endswith("repos/create") else 200)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    yield seen
    server.shutdown()
    server.server_close()


def pushed(tmp_path: Path) -> list[str]:
    run = written_run(tmp_path / "run", "word")
    run.log_config({"recipe": "r", "seed": 0, "model": {"path": "owner/base"}, "optim": {"lr": 1e-4}})
    (run.path / "lora").mkdir()
    (run.path / "lora/pytorch_lora_weights.safetensors").write_bytes(b"weights")
    return ["push", str(run.path), "me/red", "--private", *ASKED]


def test_a_push_creates_the_repository_and_commits_every_file(hub, tmp_path, capsys):
    assert main(pushed(tmp_path)) == 0, capsys.readouterr().err
    assert "me/red" in capsys.readouterr().out
    created = json.loads(hub["/api/repos/create"])
    assert created["name"] == "red" and (created.get("private") or created.get("visibility") == "private")
    (commit,) = [body for path, body in hub.items() if "commit" in path]
    lines = [json.loads(line)["value"] for line in commit.splitlines()]
    files = {line["path"]: base64.b64decode(line["content"]) for line in lines if "path" in line}
    assert files["pytorch_lora_weights.safetensors"] == b"weights" and b"owner/base" in files["README.md"]


@pytest.mark.parametrize(("status", "words"), [(401, "hf auth login"), (403, "right to write"), (500, "answered 500")])
def test_a_refusal_of_the_hub_is_a_sentence(hub, tmp_path, capsys, status, words):
    hub["status"] = status
    assert main(pushed(tmp_path)) == 2
    said = capsys.readouterr().err
    assert said.startswith("progrpo: error: me/red was not pushed: ") and words in said and said.count("\n") == 1


def test_without_a_network_a_push_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    assert main(pushed(tmp_path)) == 2
    assert "cannot be reached" in capsys.readouterr().err
