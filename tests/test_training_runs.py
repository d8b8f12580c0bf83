"""Training as users run it: killed and started again, and in two processes."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

STEPS = 60
OPTIONS = (
    f"--steps {STEPS} --checkpoint-every 7 --log-every 5 --width 16 --depth 2 --batch-size 16 --device cpu".split()
)
FILES = ("diffusion_pytorch_model.safetensors", "config.json", "run/checkpoint.safetensors", "run/log.jsonl")


def command(out: Path) -> list[str]:
    return [sys.executable, "-m", "qdit.cli", "train", "--out", str(out), *OPTIONS]


def environment() -> dict[str, str]:
    """One thread a process: two of them share two cores."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def test_killed_at_a_random_step_and_started_again_it_gives_the_same_bits(tmp_path):
    subprocess.run(command(tmp_path / "whole"), check=True, env=environment())
    log = tmp_path / "cut" / "run" / "log.jsonl"
    wait = random.SystemRandom().uniform(0, 0.2)
    process = subprocess.Popen(command(tmp_path / "cut"), env=environment())
    deadline = time.monotonic() + 120
    while not log.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(wait)
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed: give it more steps"
    checkpoints = (tmp_path / "cut" / "run" / "checkpoint.safetensors").exists()
    subprocess.run(command(tmp_path / "cut"), check=True, env=environment())
    for name in FILES:
        whole, cut = tmp_path / "whole" / name, tmp_path / "cut" / name
        assert whole.read_bytes() == cut.read_bytes(), (name, f"killed after {wait:.2f} s", checkpoints)
    assert not [path for path in (tmp_path / "cut" / "run").iterdir() if path.name.startswith(".")]


def test_two_processes_train_one_model_with_one_log_and_one_checkpoint(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    out = tmp_path / "two"
    run = [*launch, "-m", "qdit.cli", "train", "--out", str(out), *OPTIONS, "--json"]
    done = subprocess.run(run, capture_output=True, text=True, check=False, env=environment(), timeout=180)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)  # one of the two speaks
    assert result["loss"] > 0
    lines = [json.loads(line) for line in (out / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(5, STEPS + 1, 5))
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert json.loads((out / "run" / "config.json").read_text())["processes"] == 2
    assert sorted(path.name for path in (out / "run").iterdir()) == [
        "checkpoint.safetensors",
        "config.json",
        "environment.json",
        "log.jsonl",
    ]
    # the two halves of every batch make up the batch of one process: the same data, other noise
    subprocess.run(command(tmp_path / "one"), check=True, env=environment(), capture_output=True)
    single = [json.loads(line) for line in (tmp_path / "one" / "run" / "log.jsonl").read_text().splitlines()]
    assert abs(lines[-1]["loss"] - single[-1]["loss"]) < 0.3 * single[-1]["loss"]
    # and the folder of one cannot be taken for that of the other
    refused = subprocess.run(command(out), capture_output=True, text=True, check=False, env=environment())
    assert refused.returncode == 2
    assert "field processes: found 2, expected 1" in refused.stderr


def test_accelerate_launch_trains_and_says_how_many_processes_it_really_started(tmp_path):
    """On a CPU without MPI its launcher starts one process whatever number it is given (docs/decisions/0003)."""
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "--cpu", "--num_processes", "2"]
    run = [*launch, "-m", "qdit.cli", "train", "--out", str(tmp_path / "out"), *OPTIONS]
    done = subprocess.run(run, capture_output=True, text=True, check=False, env=environment(), timeout=180)
    assert done.returncode == 0, done.stderr
    started = json.loads((tmp_path / "out" / "run" / "config.json").read_text())["processes"]
    assert (started == 2) != ("accelerate launch started one process" in done.stderr)
    lines = [json.loads(line) for line in (tmp_path / "out" / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(5, STEPS + 1, 5))
