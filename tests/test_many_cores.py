"""How the CPU's tasks are divided, simulated: with enough for many cores, in turns that end."""

from __future__ import annotations

import pytest

from bench.many_cores import Task, makespan, over_keys, planned


def test_tasks_of_the_same_sums_wait_for_each_other() -> None:
    apart = [Task(1.0, (0, 1)), Task(2.0, (2, 3)), Task(1.0, (4,))]
    assert makespan(apart, 1) == 4
    assert makespan(apart, 2) == 2
    together = [Task(1.0, (0, 1)), Task(2.0, (1, 2)), Task(1.0, (2,))]
    assert makespan(together, 3) == 4


@pytest.mark.parametrize(
    ("rows", "keys", "symmetric"), [(8192, 8192, True), (4096, 4096, False), (256, 65_536, False)]
)
def test_sixteen_cores_are_kept_busy(rows: int, keys: int, symmetric: bool) -> None:
    tasks = planned(rows, keys, symmetric=symmetric, products=1)
    total = sum(task.pairs for task in tasks)
    assert total >= rows * keys / (2 if symmetric else 1)
    assert makespan(tasks, 1) == total
    assert makespan(tasks, 16) < total / (16 * 0.75)


def test_a_pass_over_the_keys_keeps_sixteen_cores_busy() -> None:
    tasks = over_keys(256, 65_536, products=2)
    assert makespan(tasks, 16) < 2 * 256 * 65_536 / (16 * 0.75)
