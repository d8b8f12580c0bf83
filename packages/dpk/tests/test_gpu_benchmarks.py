"""The checks and measurements for the GPU run on a CPU at their smallest sizes."""

import pytest
from dpk import gpu_benchmarks, gpu_tasks
from papercore.gpu import Request

TASKS = {task.name: task for task in gpu_benchmarks.tasks()}


@pytest.mark.parametrize("name", ["check-all-pairs-cka", "benchmark-all-pairs-cka"])
def test_tables_of_cka_run_at_tiny_size(name):
    found = TASKS[name].run(Request("cpu", True, None))
    if name == "check-all-pairs-cka":
        assert found["largest error"] < 1e-3
    else:
        assert found["milliseconds"]["table"] > 0


def test_names_are_unique_in_the_queue():
    names = [task.name for task in gpu_tasks.tasks()]
    assert len(set(names)) == len(names)
    assert TASKS.keys() < set(names)  # the others run with the queue's own test
