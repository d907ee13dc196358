import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allrounder.continual import average_accuracy, backward_transfer, forgetting, forward_transfer, plasticity
from allrounder.errors import InputError

HAND = [[0.9, 0.1], [0.5, 0.8]]


def test_the_matrix_by_hand():
    assert average_accuracy(HAND) == pytest.approx(0.65)
    assert forgetting(HAND) == pytest.approx(0.4)
    assert backward_transfer(HAND) == pytest.approx(-0.4)
    assert forward_transfer(HAND, [0.0, 0.3]) == pytest.approx(0.1 - 0.3)
    assert plasticity(HAND) == pytest.approx(0.85)


@given(
    st.integers(2, 6).flatmap(
        lambda n: st.lists(st.lists(st.floats(0, 1), min_size=n, max_size=n), min_size=n, max_size=n)
    )
)
def test_average_is_plasticity_and_backward_transfer(matrix):
    tasks = len(matrix)
    right = plasticity(matrix) + (tasks - 1) / tasks * backward_transfer(matrix)
    assert average_accuracy(matrix) == pytest.approx(right, abs=1e-9)
    best_first = [
        [min(row[j], matrix[j][j]) if i > j else row[j] for j in range(tasks)] for i, row in enumerate(matrix)
    ]
    assert forgetting(best_first) == pytest.approx(-backward_transfer(best_first), abs=1e-9)


def test_forgetting_is_negative_where_the_end_is_best():
    assert forgetting([[0.5, 0.0], [0.7, 0.9]]) == pytest.approx(-0.2)


def test_tasks_that_return_are_counted_from_where_they_were_first_learned():
    matrix = [[0.9, 0.0], [0.4, 0.8], [0.8, 0.6]]  # task 0, task 1, task 0 again
    assert forgetting(matrix, [0, 1]) == pytest.approx(((0.9 - 0.8) + (0.8 - 0.6)) / 2)
    assert backward_transfer(matrix, [0, 1]) == pytest.approx(((0.8 - 0.9) + (0.6 - 0.8)) / 2)


def test_one_task_has_no_transfer():
    assert math.isnan(forgetting([[0.9]]))
    assert math.isnan(forward_transfer([[0.9]], [0.1]))


def test_bad_matrices():
    with pytest.raises(InputError, match="rows of one length"):
        forgetting([[1.0], [1.0, 0.5]])
    with pytest.raises(InputError, match="tasks need the row"):
        backward_transfer([[0.5, 0.5]], [0, 1])
