"""How continual learning is counted, from the matrix A of accuracies: row i after experience i, column j for task j.

With T tasks, each first learned in row r(j) (r(j) = j when every task comes once):

- average accuracy `(1/T) sum_j A[T][j]`;
- forgetting `(1/(T-1)) sum_{j<T} (max_{r(j) <= i < T} A[i][j] - A[T][j])`: the best before the end less the end, so it
  is negative where the end is best (Chaudhry et al., 2018; other libraries let the maximum include the end, and then
  it is never negative, or take the first value instead of the best);
- backward transfer `(1/(T-1)) sum_{j<T} (A[T][j] - A[r(j)][j])`, forward transfer
  `(1/(T-1)) sum_{j>1} (A[r(j)-1][j] - b_j)` with b the accuracy before any training (Lopez-Paz and Ranzato, 2017);
- plasticity `(1/T) sum_j A[r(j)][j]`.

Identities: forgetting = -backward transfer when the diagonal holds the best; average = plasticity + (T-1)/T x backward
transfer when tasks come once.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import InputError

__all__ = ["average_accuracy", "backward_transfer", "forgetting", "forward_transfer", "plasticity"]

Matrix = Sequence[Sequence[float]]


def _checked(matrix: Matrix, first: Sequence[int] | None) -> tuple[int, list[int]]:
    widths = {len(row) for row in matrix}
    if not matrix or len(widths) != 1 or widths == {0}:
        raise InputError(f"a matrix of accuracies has rows of one length, got lengths {sorted(widths)}")
    (tasks,) = widths
    rows = list(range(tasks)) if first is None else list(first)
    if len(rows) != tasks or max(rows) >= len(matrix):
        raise InputError(f"{tasks} tasks need the row where each was first learned, got {rows} for {len(matrix)} rows")
    return tasks, rows


def average_accuracy(matrix: Matrix) -> float:
    """Mean over tasks after the last experience.

    >>> average_accuracy([[0.9, 0.1], [0.5, 0.8]])
    0.65
    """
    tasks, _ = _checked(matrix, [0] * len(matrix[0]) if matrix else None)
    return sum(matrix[-1]) / tasks


def forgetting(matrix: Matrix, first: Sequence[int] | None = None) -> float:
    """How much of the best of each earlier task is lost at the end; `nan` for one task.

    >>> round(forgetting([[0.9, 0.1], [0.5, 0.8]]), 2)
    0.4
    """
    tasks, rows = _checked(matrix, first)
    lost = [
        max(matrix[i][j] for i in range(rows[j], len(matrix) - 1)) - matrix[-1][j]
        for j in range(tasks)
        if rows[j] < len(matrix) - 1
    ]
    return sum(lost) / len(lost) if lost else float("nan")


def backward_transfer(matrix: Matrix, first: Sequence[int] | None = None) -> float:
    """Change of each earlier task since it was first learned; `nan` for one task.

    >>> round(backward_transfer([[0.9, 0.1], [0.5, 0.8]]), 2)
    -0.4
    """
    tasks, rows = _checked(matrix, first)
    change = [matrix[-1][j] - matrix[rows[j]][j] for j in range(tasks) if rows[j] < len(matrix) - 1]
    return sum(change) / len(change) if change else float("nan")


def forward_transfer(matrix: Matrix, before: Sequence[float], first: Sequence[int] | None = None) -> float:
    """What a task gains before it is learned, over an untrained model; `nan` for one task.

    >>> round(forward_transfer([[0.9, 0.1], [0.5, 0.8]], [0.0, 0.05]), 2)
    0.05
    """
    tasks, rows = _checked(matrix, first)
    gain = [matrix[rows[j] - 1][j] - before[j] for j in range(tasks) if rows[j] > 0]
    return sum(gain) / len(gain) if gain else float("nan")


def plasticity(matrix: Matrix, first: Sequence[int] | None = None) -> float:
    """Mean accuracy on each task when it was just learned."""
    tasks, rows = _checked(matrix, first)
    return sum(matrix[rows[j]][j] for j in range(tasks)) / tasks
