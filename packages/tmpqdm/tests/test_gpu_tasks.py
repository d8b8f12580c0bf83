"""The GPU queue's tasks at tiny size on the CPU, and the Triton kernel in its interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from papercore.gpu import Request
from tmpqdm import gpu_tasks


@pytest.mark.parametrize("task", gpu_tasks.tasks(), ids=lambda task: task.name)
def test_task(task):
    if task.kind == "reproduction":
        pytest.skip("tested where the reproduction is")
    assert task.run(Request("cpu", True, None))


def test_kernel_in_the_interpreter():
    pytest.importorskip("triton")
    script = Path(__file__).with_name("kernels_in_interpreter.py")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
