"""Accuracy by group against fairlearn and arithmetic; what is marked, left out or refused."""

import numpy as np
import pytest
from fairlearn.metrics import MetricFrame
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score

from workbench.errors import DataError
from workbench.evaluation.fairness import Grouped, by_group
from workbench.evaluation.similarity import Measured

# Deadlines would measure the machine, not the code; the database would write into the checkout.
quick = settings(max_examples=30, deadline=None, database=None)


def grouped(
    correct: list[list[float]], group: list[str | None], image: list[int] | None = None, smallest: int = 1,
    resamples: int = 50,
) -> Grouped:  # fmt: skip
    images = np.arange(len(group)) if image is None else np.array(image)
    return by_group(np.array(correct, dtype=float), group, images, smallest, resamples)


HAND = [[1, 1, 0, 1, 0, 0], [0, 0, 0, 1, 1, 1]]
GROUPS = ["b", "a", "a", "b", "a", "b"]


def test_groups_of_a_hand_case():
    found = grouped(HAND, GROUPS)
    assert found.groups == ["a", "b"]
    assert found.counts == [3, 3]
    assert found.judged == [True, True]
    # a holds questions 1, 2 and 4: (1 + 0 + 0) / 3 and (0 + 0 + 1) / 3; b holds 0, 3 and 5: 2 / 3 and 2 / 3.
    assert found.measured[0].value.tolist() == pytest.approx([1 / 3, 1 / 3])
    assert found.measured[1].value.tolist() == pytest.approx([2 / 3, 2 / 3])
    assert found.worst.value.tolist() == pytest.approx([1 / 3, 1 / 3])
    assert found.gap.value.tolist() == pytest.approx([1 / 3, 1 / 3])


def test_each_model_has_a_worst_group_of_its_own():
    # The first model never finds a, the second finds b once in two.
    found = grouped([[0, 0, 1, 1], [1, 1, 1, 0]], ["a", "a", "b", "b"])
    assert found.worst.value.tolist() == [0, 0.5]
    assert found.gap.value.tolist() == [1, 0.5]


@quick
@given(
    st.lists(
        st.tuples(st.sampled_from(["east", "north", "10", "9"]), st.booleans(), st.booleans()),
        min_size=2, max_size=60,
    ).filter(lambda rows: len({row[0] for row in rows}) > 1)
)  # fmt: skip
def test_values_worst_group_and_gap_are_fairlearns(rows):
    names, *answers = zip(*rows, strict=True)
    found = grouped([[float(one) for one in model] for model in answers], list(names), resamples=3)
    for model, answer in enumerate(answers):
        frame = MetricFrame(
            metrics={"accuracy": accuracy_score, "count": lambda true, _: len(true)},
            y_true=np.ones(len(rows), dtype=int), y_pred=np.array(answer, dtype=int),
            sensitive_features=np.array(names),
        )  # fmt: skip
        for name, measured, count in zip(found.groups, found.measured, found.counts, strict=True):
            assert measured.value[model] == pytest.approx(frame.by_group["accuracy"][name])
            assert count == frame.by_group["count"][name]
        assert found.worst.value[model] == pytest.approx(frame.group_min()["accuracy"])
        assert found.gap.value[model] == pytest.approx(frame.difference(method="between_groups")["accuracy"])


def test_small_groups_stay_visible_and_are_marked_but_judge_nothing():
    # c is the worst and has two images only.
    found = grouped([[1, 1, 1, 0, 1, 0, 0, 0]], ["a", "a", "a", "b", "b", "b", "c", "c"], smallest=3)
    assert found.groups == ["a", "b", "c"]
    assert found.counts == [3, 3, 2]
    assert found.judged == [True, True, False]
    assert found.measured[2].value.tolist() == [0]
    assert found.measured[2].resampled.shape == (1, 50)
    # a 3 / 3, b 1 / 3
    assert found.worst.value.tolist() == pytest.approx([1 / 3])
    assert found.gap.value.tolist() == pytest.approx([2 / 3])


def test_one_group_that_is_large_enough_has_no_gap():
    found = grouped([[1, 0, 0]], ["a", "a", "b"], smallest=2)
    assert found.judged == [True, False]
    assert found.worst is None
    assert found.gap is None


def test_all_images_in_one_group_have_no_gap():
    found = grouped([[1, 0, 0]], ["a", "a", "a"])
    assert found.groups == ["a"]
    assert found.measured[0].value.tolist() == pytest.approx([1 / 3])
    assert found.worst is None
    assert found.gap is None


def test_questions_without_a_group_are_left_out():
    found = grouped([[1, 0, 1, 1, 0]], ["a", None, "b", None, "b"])
    assert found.groups == ["a", "b"]
    assert found.counts == [1, 2]
    assert [measured.value.tolist() for measured in found.measured] == [[1], [0.5]]


def test_no_group_at_all_is_an_error_that_says_what_to_do():
    with pytest.raises(DataError, match="no image has a value in the group column; choose another"):
        grouped([[1, 0]], [None, None])


def test_counts_are_of_images_and_not_of_questions():
    # Two images of a, each asked twice, and one of b, asked four times: b has more questions per image.
    found = grouped(
        [[1, 1, 0, 0, 1, 1, 1, 0]], ["a"] * 4 + ["b"] * 4, image=[7, 7, 3, 3, 5, 5, 5, 5], smallest=2
    )
    assert found.counts == [2, 1]
    assert found.judged == [True, False]
    assert [measured.value.tolist() for measured in found.measured] == [[0.5], [0.75]]


# --- intervals ----------------------------------------------------------------------------------------------


def test_resamples_are_one_row_per_model_and_the_worst_and_the_gap_follow_them():
    found = grouped(HAND, GROUPS, resamples=200)
    drawn = np.stack([measured.resampled for measured in found.measured])
    assert drawn.shape == (2, 2, 200)
    assert np.array_equal(found.worst.resampled, drawn.min(0))
    assert np.array_equal(found.gap.resampled, drawn.max(0) - drawn.min(0))
    assert (found.gap.resampled >= 0).all()


def test_models_are_measured_on_the_same_resamples():
    found = grouped([HAND[0], HAND[0]], GROUPS, resamples=200)
    for measured in (*found.measured, found.worst, found.gap):
        assert np.array_equal(*measured.resampled)
        assert measured.resampled.std() > 0


def test_whole_images_are_resampled():
    # 100 images, half of them right, asked 20 times each: the deviation is that of 100 answers, not of 2,000:
    # sqrt(0.5 * 0.5 / 100) = 0.05 and not 0.011.
    answers = np.repeat(np.arange(100) % 2, 20)
    found = grouped([answers.tolist()], ["a"] * 2000, np.repeat(np.arange(100), 20).tolist(), resamples=2000)
    # The deviation of 2,000 resamples is known to 2 %.
    assert found.measured[0].resampled.std() == pytest.approx(0.05, rel=0.1)


def test_groups_of_equal_size_vary_on_their_own():
    # Two groups of 100 images, the first half of each right: alike, as far as one can tell from so few.
    # The difference has deviation sqrt(2 * 0.25 / 100) = 0.0707, so the gap's mean is 0.0707 * sqrt(2 / pi) =
    # 0.056, and 5 % of the gaps are above 1.96 * 0.0707 = 0.139. Drawn alike, both groups would move as one.
    answers = ((np.arange(200) % 100) < 50).astype(float).tolist()
    found = grouped([answers], ["a"] * 100 + ["b"] * 100, resamples=2000)
    assert found.gap.value.tolist() == [0]
    drawn = found.gap.resampled[0]
    assert drawn.mean() == pytest.approx(0.056, rel=0.15)
    assert Measured.interval(drawn, 0.9)[1] == pytest.approx(0.139, rel=0.15)
    one, other = (measured.resampled[0] for measured in found.measured)
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.1


def test_the_same_call_gives_the_same_numbers():
    one, other = (grouped(HAND, GROUPS, resamples=100) for _ in range(2))
    assert np.array_equal(one.gap.resampled, other.gap.resampled)
