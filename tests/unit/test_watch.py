"""The watches of a run: for signs that nothing is learnt, and for signs of cheating."""

import json
import math

import numpy as np
import pytest

from progrpo.training.errors import SelfCheckError
from progrpo.training.pictures import diversity, group_diversities, saturation, sharpness
from progrpo.training.settings import WatchSettings
from progrpo.training.watch import HackingWatch, SelfChecks, change


def checks(**settings) -> SelfChecks:
    defaults = {"max_skipped": 0.2, "flat_iterations": 3, "still_iterations": 3, "lost_agreement": 0.25}
    return SelfChecks(WatchSettings(**{**defaults, **settings}))


# --- updates ----------------------------------------------------------------------------------------------------------


def test_one_bad_update_is_forgiven_and_a_fifth_of_the_last_twenty_is_not():
    watch = checks()
    for iteration in range(40):
        watch.check_updates(iteration, 1 if iteration % 5 == 4 else 0, 1)  # exactly a fifth, never more
    with pytest.raises(SelfCheckError, match=r"iteration 40: 5 of the last 20 updates were skipped"):
        watch.check_updates(40, 1, 1)


def test_two_bad_updates_at_the_start_are_too_many():
    watch = checks()
    watch.check_updates(0, 1, 1)
    with pytest.raises(SelfCheckError, match="2 of the last 2"):
        watch.check_updates(1, 1, 1)


def test_of_several_updates_an_iteration_each_counts():
    watch = checks()
    watch.check_updates(0, 1, 4)
    with pytest.raises(SelfCheckError, match="3 of the last 8"):
        watch.check_updates(1, 2, 4)


def test_of_an_iteration_with_more_than_twenty_updates_each_counts():
    with pytest.raises(SelfCheckError, match="10 of the last 40"):
        checks().check_updates(0, 10, 40)


def test_it_can_be_turned_off():
    watch = checks(max_skipped=0.0, flat_iterations=0, still_iterations=0, lost_agreement=0.0)
    for iteration in range(30):
        watch.check_updates(iteration, 1, 1)
        watch.check_rewards(iteration, {"advantage/zero_variance_groups": 2, "reward/mean": 0.5}, 2)
        watch.check_weights(iteration, 1.0, True)
        watch.check_agreement(iteration, [0.9 if iteration < 10 else -0.9])


# --- rewards ----------------------------------------------------------------------------------------------------------


def flat(mean: float, groups: int = 4) -> dict[str, float]:
    return {"advantage/zero_variance_groups": groups, "reward/mean": mean}


def test_a_reward_that_is_always_the_same_is_called_so():
    watch = checks()
    watch.check_rewards(0, flat(0.5), 4)
    watch.check_rewards(1, flat(0.5), 4)
    with pytest.raises(SelfCheckError, match=r"iteration 2: for 3 iterations no group's.*0\.5 for every picture"):
        watch.check_rewards(2, flat(0.5), 4)


def test_groups_without_variance_are_called_so():
    watch = checks()
    watch.check_rewards(0, flat(0.5), 4)
    watch.check_rewards(1, flat(0.7), 4)
    with pytest.raises(SelfCheckError, match="too hard or too easy"):
        watch.check_rewards(2, flat(0.5), 4)


@pytest.mark.parametrize("mean", [0.5, 0.7])
def test_groups_that_lack_scores_are_not_called_alike(mean):
    watch = checks()
    for iteration in range(2):
        watch.check_rewards(iteration, flat(0.5) | {"reward/skipped_groups": 0}, 4)
    with pytest.raises(SelfCheckError, match=r"3 of the last iteration's 4 groups had fewer scores than reward.quorum"):
        watch.check_rewards(2, flat(mean) | {"reward/skipped_groups": 3}, 4)


def test_one_group_that_differs_begins_anew():
    watch = checks()
    for iteration in range(12):
        watch.check_rewards(iteration, flat(0.5, 3 if iteration % 3 == 2 else 4), 4)


# --- weights ----------------------------------------------------------------------------------------------------------


def test_weights_that_do_not_move_stop_the_run():
    watch = checks()
    watch.check_weights(0, 1.5, True)
    watch.check_weights(1, 1.5, True)
    watch.check_weights(2, 1.5, True)
    with pytest.raises(SelfCheckError, match="iteration 3: for 3 iterations no trained weight has moved"):
        watch.check_weights(3, 1.5, True)


def test_where_nothing_was_taught_nothing_need_move():
    watch = checks()
    for iteration in range(20):
        watch.check_weights(iteration, 1.5, iteration % 3 == 0)


# --- previews ---------------------------------------------------------------------------------------------------------


def test_previews_that_no_longer_agree_stop_the_run():
    watch = checks()
    for iteration, agreement in enumerate([0.8] * 6 + [0.2, 0.1, 0.1, 0.1]):
        watch.check_agreement(iteration, [agreement, agreement])
    with pytest.raises(
        SelfCheckError, match=r"iteration 10: previews.*0\.12 over the last 5 audits, 0\.80 at its best"
    ):
        watch.check_agreement(10, [0.1])


def test_previews_that_never_agreed_have_not_collapsed():
    watch = checks()
    for iteration in range(30):
        watch.check_agreement(iteration, [0.25 if iteration < 10 else -0.2, None])
        watch.check_agreement(iteration, [None])


def test_agreements_at_other_points_are_not_compared():
    watch = checks()
    for iteration in range(6):
        watch.check_agreement(iteration, [0.8])
    watch.forget_agreement()
    for iteration in range(6, 12):
        watch.check_agreement(iteration, [0.1])


# --- state ------------------------------------------------------------------------------------------------------------


def test_checks_go_on_from_their_state():
    watch = checks()
    watch.check_updates(0, 1, 1)
    for iteration in range(2):
        watch.check_rewards(iteration, flat(0.5), 4)
    for iteration in range(3):
        watch.check_weights(iteration, 1.5, True)
    for iteration, agreement in enumerate([0.8] * 5 + [0.1] * 4):
        watch.check_agreement(iteration, [agreement])
    state = json.loads(json.dumps(watch.state_dict()))
    for tell in (
        lambda w: w.check_updates(1, 1, 1),
        lambda w: w.check_rewards(2, flat(0.5), 4),
        lambda w: w.check_weights(3, 1.5, True),
        lambda w: w.check_agreement(9, [0.1]),
    ):
        resumed = checks()
        resumed.load_state_dict(state)
        with pytest.raises(SelfCheckError):
            tell(resumed)


# --- cheating ---------------------------------------------------------------------------------------------------------

NOISE = np.random.default_rng(0).normal(0, 0.1, (8, 100))


def around(mean: float, which: int) -> list[float | None]:
    return list(mean + NOISE[which])


def test_a_change_is_paired_and_has_a_standard_error():
    difference = change([1.0, 2.0, None, 4.0], [2.0, 2.5, 9.0, 4.0])
    differences = np.array([1.0, 0.5, 0.0])
    assert difference.value == pytest.approx(0.5)
    assert difference.error == pytest.approx(differences.std(ddof=1) / math.sqrt(3))
    assert not difference.rose and not difference.fell
    assert change([0.0] * 50, [1.0] * 50).rose and change([1.0] * 50, [0.0] * 50).fell
    assert change([1.0], [2.0]).error == math.inf and not change([1.0, 1.0], [1.0, 1.0]).rose


def test_a_witness_that_falls_from_its_best_while_the_reward_rises_is_named():
    watch = HackingWatch()
    rounds = [(0.3, 0.5), (0.4, 0.6), (0.6, 0.4), (0.7, 0.3)]
    signs = [watch.signs(around(r, 0), {"held-out hpsv2": around(w, 1)}, {}) for r, w in rounds]
    assert signs[:2] == [[], []] and [len(f) for f in signs[2:]] == [1, 1]
    assert signs[2][0].startswith("held-out hpsv2 fell from 0.59") and "rose from 0.4" in signs[2][0]
    assert watch.alarms == 2
    assert watch.signs(around(0.7, 2), {"held-out hpsv2": around(0.65, 3)}, {}) == [] and watch.alarms == 0


def test_what_falls_together_or_hardly_is_no_cheating():
    watch = HackingWatch()
    watch.signs(around(0.5, 0), {"w": around(0.5, 1)}, {})
    assert watch.signs(around(0.3, 2), {"w": around(0.3, 3)}, {}) == []  # both fell
    assert watch.signs(around(0.7, 2), {"w": around(0.499, 3)}, {}) == []  # within the error
    assert watch.signs(around(0.7, 2), {"w": [None] * 100}, {}) == []


def test_pictures_that_become_of_another_kind_are_named():
    watch = HackingWatch()
    watch.signs(around(0.5, 0), {}, {"saturation": [0.2] * 100, "diversity": [0.3] * 5})
    assert watch.signs(around(0.7, 1), {}, {"saturation": [0.25] * 100, "diversity": [0.25] * 5}) == []
    (first, second) = watch.signs(around(0.7, 1), {}, {"saturation": [0.4] * 100, "diversity": [0.1] * 5})
    assert first.startswith("saturation of the pictures went from 0.2 to 0.4") and second.startswith("diversity")
    assert watch.signs(around(0.5, 1), {}, {"saturation": [0.4] * 100}) == []  # the reward did not rise


def test_a_statistic_is_compared_with_the_first_there_was_however_many_values_it_has():
    watch = HackingWatch()
    for values in ([], [None], [0.3]):  # one value is none
        assert watch.signs(around(0.5, 0), {}, {"diversity": values}) == []
    assert watch.signs(around(0.7, 1), {}, {"diversity": [0.3, None, 0.28]}) == []
    (said,) = watch.signs(around(0.7, 1), {}, {"diversity": [0.1] * 5})
    assert said.startswith("diversity of the pictures went from 0.29 to 0.1")


def test_a_witness_that_has_no_values_at_first_is_watched_from_when_it_has():
    watch = HackingWatch()
    rounds = [(0.2, None), (0.4, 0.8), (0.6, None), (0.7, 0.3)]
    signs = [watch.signs(around(r, 0), {"w": [None] * 100 if w is None else around(w, 1)}, {}) for r, w in rounds]
    assert signs[:3] == [[], [], []] and signs[3][0].startswith("w fell from 0.79")


def test_going_too_far_from_the_reference_is_a_sign_while_the_reward_rises():
    watch = HackingWatch(max_kl=0.5)
    assert watch.signs(around(0.5, 0), {}, {}, 0.9) == []  # nothing to compare with
    assert watch.signs(around(0.7, 1), {}, {}, 0.4) == [] == watch.signs(around(0.7, 1), {}, {}, None)
    (said,) = watch.signs(around(0.7, 1), {}, {}, 0.6)
    assert "went 0.6 (mean square) from the reference's, over watch.max_kl 0.5" in said and watch.alarms == 1
    assert watch.signs(around(0.3, 1), {}, {}, 0.6) == []  # the reward fell
    unlimited = HackingWatch()
    assert [unlimited.signs(around(r, 0), {}, {}, 99.0) for r in (0.5, 0.9)] == [[], []]


def test_the_watch_goes_on_from_its_state():
    watch, other = HackingWatch(), HackingWatch()
    for w in (watch, other):
        w.signs(around(0.5, 0), {"w": around(0.6, 1)}, {"saturation": [0.2] * 100})
    other = HackingWatch()
    other.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    scores = around(0.8, 2), {"w": around(0.3, 3)}, {"saturation": [0.5] * 100}
    assert watch.signs(*scores) == other.signs(*scores) != [] and watch.alarms == other.alarms == 1


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_sharpness_by_hand():
    picture = np.zeros((2, 3, 3), np.uint8)
    picture[:, 1] = 255  # two edges of full height in each row, none in a column
    assert sharpness(picture) == pytest.approx((0 + 1) / 2)
    assert sharpness(np.full((4, 4, 3), 77, np.uint8)) == 0


def test_saturation_by_hand():
    colours = np.array([[[255, 0, 0], [128, 128, 128], [0, 0, 0], [200, 100, 100]]], np.uint8)
    assert saturation(colours) == pytest.approx((1 + 0 + 0 + 0.5) / 4)


def test_diversity_within_groups():
    images = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)
    group = np.array([0, 0, 0, 1, 1, 2, 0])
    expected = [diversity(images[[0, 1, 2, 6]]), diversity(images[[3, 4]])]
    assert group_diversities(images, group) == pytest.approx(expected)
    assert group_diversities(images[:1], group[:1]) == []
    large = images.repeat(16, axis=1).repeat(16, axis=2)  # of 128 pixels every second is looked at
    assert group_diversities(large, group) == pytest.approx(expected)
