"""The checks and measurements for the GPU run on a CPU at their smallest sizes."""

import pytest
from dpk import gpu_benchmarks, gpu_tasks
from papercore.gpu import Request


@pytest.mark.parametrize("task", gpu_benchmarks.tasks(), ids=lambda task: task.name)
def test_tasks_run_at_tiny_size(task):
    found = task.run(Request("cpu", True, None))
    if task.name == "benchmark-all-pairs-cka":
        assert found["milliseconds"]["table"] > 0
    elif task.name == "check-detector":
        assert len(found["rho"]) == found["levels"] == 5
    elif task.name == "check-all-pairs-cka":
        assert found["largest error"] < 1e-3
    else:
        assert {row["method"] for row in found["batch 4"]} >= {"dpk", "fitnet", "reviewkd"}


def test_names_are_unique_in_the_queue():
    names = [task.name for task in gpu_tasks.tasks()]
    assert len(set(names)) == len(names)
    assert {task.name for task in gpu_benchmarks.tasks()} < set(names)
