"""Arguments of a call are learnt from calls that differ in one thing, made anew, and refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from progrpo.policies.learnt.argument import Given, leaves
from progrpo.policies.learnt.comparison import Calls, Probe, learn
from progrpo.policies.learnt.rearranged import probes

TIMES = torch.tensor([900.0, 400.0, 33.3])
PROBE = Probe(size=6, timesteps=TIMES, scales=(2.0, 5.0), num_train_timesteps=1000)
X, T = torch.zeros(1, 6), torch.tensor(1000.0)


def text_of(count: int, rows: int = 1) -> Tensor:
    return torch.arange(1.0, count + 1).reshape(1, count, 1).expand(rows, count, 2)


def call(x: Tensor = X, t: Tensor = T, w: float = 1.0, tokens: int = 3, beside: float = 9.0) -> dict[str, Any]:
    """A call of every kind of argument."""
    rows = len(x)
    latents = torch.cat([x.reshape(rows, 2, 3).flip(2), torch.full((rows, 1, 3), beside)], 1)
    return {
        "latents": [row.unsqueeze(0) for row in latents],
        "timestep": (1000 - t).expand(rows) / 1000,
        "embeds": text_of(tokens, rows),
        "ids": torch.arange(tokens),
        "lengths": [tokens] * rows,
        "guidance": torch.full((rows,), w * 1000),
        "more": {"size": (8, 8), "shapes": [[(1, 2, 3)]] * rows, "scale": torch.ones(rows, 4), "none": None},
    }


def calls(**changes: Any) -> Calls:
    made = {
        "base": call(),
        "pair": call(x=X.expand(2, 6)),
        "texts": [call(tokens=2), call(tokens=5)],
        "pictures": [],
        "scales": [call(w=w) for w in PROBE.scales],
        "times": [call(t=t) for t in TIMES],
        "latents": [call(x=x[None]) for x in probes(6)],
    }
    return Calls(**(made | changes))


def test_a_call_of_several_rows_is_made_as_the_pipeline_would():
    inputs = learn(calls(), PROBE)
    rows = [inputs.text(call(tokens=4), ""), inputs.text(call(tokens=4), "")]
    condition = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    x, t = torch.randn(2, 6), torch.tensor([750.0, 250.0])
    made = inputs.make(Given(x, t, torch.tensor([3.0, 4.0]), condition))
    expected = [call(x=x[i : i + 1], t=t[i], w=3.0 + i, tokens=4) for i in range(2)]
    for i, one in enumerate(expected):
        assert torch.equal(made["latents"][i], one["latents"][0])
        for name in ("timestep", "embeds", "guidance"):
            assert torch.equal(made[name][i], one[name][0]), name
    assert torch.equal(made["ids"], torch.arange(4)) and made["lengths"] == [4, 4]
    assert made["more"]["shapes"] == [[(1, 2, 3)]] * 2 and made["more"]["scale"].shape == (2, 4)
    assert made["more"]["size"] == (8, 8) and made["more"]["none"] is None


def test_what_stands_beside_latents_may_depend_on_the_text():
    inputs = learn(calls(texts=[call(tokens=2, beside=4.0), call(tokens=5, beside=-1.0)]), PROBE)
    condition = inputs.text(call(beside=5.0), "")
    made = inputs.make(Given(torch.ones(1, 6), torch.ones(1), torch.ones(1), condition))
    assert torch.equal(made["latents"][0], call(x=torch.ones(1, 6), beside=5.0)["latents"][0])
    assert len(leaves(inputs)) == 11


def changed(part: str, value: Any, **options: Any) -> dict[str, Any]:
    return {**call(**options), part: value}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"times": [changed("timestep", (t**2).expand(1), t=t) for t in TIMES]}, "timestep follows .* no straight"),
        ({"latents": [changed("latents", [x[None].square()]) for x in probes(6)]}, "latents is made of the latents by"),
        (
            {"latents": [changed("embeds", text_of(3) + x.sum()) for x in probes(6)]},
            "embeds is made of the latents by more",
        ),
        (
            {"times": [changed("more", {**call()["more"], "size": (int(t), 8)}, t=t) for t in TIMES]},
            "more.size.0 is no",
        ),
        ({"scales": [changed("guidance", torch.full((1,), w**2)) for w in (2.0, 5.0)]}, "guidance is no multiple of"),
        ({"texts": [changed("ids", torch.arange(3) + 1)]}, "ids is one for all rows and depends on the text"),
    ],
)
def test_an_argument_of_no_known_kind_is_named(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        learn(calls(**changes), PROBE)


def test_a_text_unlike_those_that_were_learnt_from_is_refused():
    inputs = learn(calls(), PROBE)
    with pytest.raises(ValueError, match="embeds has a length of 7 for this text, and at most 5 were counted on"):
        inputs.text(call(tokens=7), "")
    with pytest.raises(ValueError, match=r"more\.size\.0 differs from what it was for the texts"):
        inputs.text({**call(), "more": {**call()["more"], "size": (9, 8)}}, "")
