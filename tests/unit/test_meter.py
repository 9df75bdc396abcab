import time

import pytest

from progrpo.rollout.meter import Meter
from progrpo.types import Cost


def test_counts_add_up():
    meter = Meter()
    meter.count(nfe=3)
    meter.count(nfe=4, decodes=2, reward_calls=2)
    meter.count(trained_steps=5)
    assert meter.cost == Cost(nfe=7, decodes=2, reward_calls=2, trained_steps=5)


def test_what_is_not_a_cost_is_refused():
    with pytest.raises(TypeError, match="steps"):
        Meter().count(steps=1)


def test_seconds_add_up_by_stage():
    meter = Meter()
    for name in ("sample", "reward", "sample"):
        with meter.stage(name):
            time.sleep(0.01)
    assert list(meter.seconds) == ["sample", "reward"]
    assert meter.seconds["sample"] >= 0.02 and meter.seconds["reward"] >= 0.01


def test_meters_share_nothing():
    first, second = Meter(), Meter()
    first.count(nfe=1)
    with first.stage("sample"):
        pass
    assert second.cost == Cost() and second.seconds == {}
