"""The commands of the search from end to end, on a network of a few training steps."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from papercore import cli
from papercore.errors import InputError
from tmpqdm.cli import COMMANDS
from tmpqdm.explain import gene_effects, kind_of
from tmpqdm.plan import Plan
from tmpqdm.workflow import budget_name, parse_budget

QUICK = ["--steps", "3", "--bits", "8", "6", "4", "--features", "pixels", "--images", "140", "--batch-size", "70",
         "--population", "5", "--generations", "2", "--finalists", "2", "--calibration-samples", "2"]  # fmt: skip


def run(*arguments: object) -> int:
    return cli.main("tmpqdm", COMMANDS, "test", [str(a) for a in arguments])


def printed(capsys, *arguments: object) -> dict:
    capsys.readouterr()
    assert run(*arguments, "--json") == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def searched(small_folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "search"
    assert run("search", small_folder, "--out", out, "--budget", "uniform:6", "uniform:8", *QUICK) == 0
    return out


def test_groups(capsys):
    found = printed(capsys, "groups", "--steps", "10")
    assert found["edges"] == [0, 9, 39, 88, 158, 246, 355, 483, 632, 800, 1000]
    assert len(found["groups"]) == 10
    assert run("groups", "--steps", "30") == 2
    assert "allow_fewer" in capsys.readouterr().err
    assert len(printed(capsys, "groups", "--steps", "30", "--allow-fewer")["groups"]) == 29
    assert printed(capsys, "groups", "--edges", "0", "5", "1000")["edges"] == [0, 5, 1000]
    assert len(printed(capsys, "groups", "--grouping", "log-snr", "--steps", "4")["groups"]) == 4


def test_train_leaves_a_network_that_is_read_again(digits_folder, tmp_path, capsys):
    assert json.loads((digits_folder / "config.json").read_text())["_class_name"] == "UNet2DModel"
    found = printed(capsys, "train", "digits", "--out", tmp_path / "m", "--steps", "2", "--device", "cpu")
    assert found["parameters"] == 176849
    assert run("train", "cifar10", "--out", tmp_path / "c") == 2
    assert "--data" in capsys.readouterr().err


def test_search_writes_a_plan_for_every_budget(searched):
    for name in ("uniform-6", "uniform-8"):
        plan = Plan.load(searched / f"plan-{name}.json")
        assert len(plan.timesteps) == 3 and [s["role"] for s in plan.scores] == ["search", "fresh noise"]
        record = json.loads((searched / f"search-{name}.json").read_text())
        assert len(record["archive"]) == 10
        assert plan.cost["bitops"] in [entry["bitops"] for entry in record["archive"]]
    cheap, dear = (Plan.load(searched / f"plan-uniform-{b}.json").cost["bitops_per_step"] for b in (6, 8))
    assert cheap < dear


def test_evaluate_sample_and_report(searched, small_folder, tmp_path, capsys):
    plan = searched / "plan-uniform-6.json"
    given = ["--model", small_folder, "--solver", searched / "solver.safetensors"]
    score = ["--features", "pixels", "--images", "140"]
    found = printed(capsys, "evaluate", plan, *given, *score)
    assert {"quantised", "full precision", "full precision, quadratic list", "n", "seed"} <= set(found)
    again = printed(capsys, "evaluate", plan, *given, *score, "--batch-size", "33")
    assert again["quantised"] == pytest.approx(found["quantised"], rel=1e-3)
    sampled = printed(capsys, "sample", plan, *given, "--images", "6", "--out", tmp_path / "s.npz")
    assert sampled["images"] == 6 and np.load(tmp_path / "s.npz")["arr_0"].shape == (6, 8, 8, 1)
    assert Path(sampled["grid"]).read_bytes().startswith(b"\x89PNG")
    shown = printed(capsys, "report", searched, "--model", small_folder, "--out", tmp_path / "report", "--images", "8")
    assert [row["budget"] for row in shown["plans"]] == ["uniform-6", "uniform-8"]
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Visited timesteps" in page and "genes that decided" in page and "Plan uniform-8" in page


def test_a_plan_for_another_network_is_refused(searched, small_folder, tmp_path, capsys):
    values = json.loads((searched / "plan-uniform-6.json").read_text())
    given = ["--model", small_folder, "--solver", searched / "solver.safetensors", "--images", "140", "--features",
             "pixels"]  # fmt: skip
    for part, key, message in (("model", "hash", "weights with hash"), ("schedule", "betas_hash", "noise schedule")):
        changed = {**values, part: {**values[part], key: "0" * 16}}
        (tmp_path / "plan.json").write_text(json.dumps(changed))
        assert run("evaluate", tmp_path / "plan.json", *given) == 2
        assert message in capsys.readouterr().err
        assert run("evaluate", tmp_path / "plan.json", *given, "--force", "--no-compare") == 0
        capsys.readouterr()


def test_a_killed_search_goes_on_to_the_same_plan(searched, small_folder, tmp_path):
    out = tmp_path / "killed"
    arguments = ["search", str(small_folder), "--out", str(out), "--budget", "uniform:6", "uniform:8", *QUICK]
    process = subprocess.Popen(
        [sys.executable, "-m", "tmpqdm.cli", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    deadline = time.monotonic() + 100
    log = out / "search.log"
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and log.read_text().count('"op_code":6') >= 3:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert log.exists() and not (out / "run.json").exists()
    assert run(*arguments) == 0
    for name in ("plan-uniform-6.json", "plan-uniform-8.json", "search-uniform-8.json"):
        assert (out / name).read_text() == (searched / name).read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "uniform:3"], "budget bitops_per_step"),
        (["--budget", "1000"], "at least"),
        (["--budget", "bytes=10"], "budget size_bytes"),
        (["--budget", "steps=2"], "budget steps"),
        (["--budget", "speed=2"], "KIND"),
        (["--budget", "uniform:4", "uniform:4"], "different"),
        (["--features", "nothing"], "features"),
        (["--images", "1"], "at least 2"),
        (["--population", "0"], "population"),
        (["--steps", "1001"], "steps"),
        (["--solver", "nothing.safetensors"], "nothing.safetensors"),
    ],
)
def test_wrong_input(small_folder, searched, tmp_path, capsys, arguments, message):
    base = [*QUICK]
    for option in arguments[::2]:
        if option in base:
            at = base.index(option)
            end = next((i for i in range(at + 1, len(base)) if base[i].startswith("--")), len(base))
            del base[at:end]
    if "--solver" not in arguments:
        base += ["--solver", str(searched / "solver.safetensors")]
    base += ["--calibration", str(searched / "calibration.safetensors")]
    assert run("search", small_folder, "--out", tmp_path / "out", *base, *arguments) == 2
    assert message in capsys.readouterr().err


def test_budgets():
    assert parse_budget("uniform:6").bitops_per_step == "uniform:6"
    made = parse_budget("bitops=1e9,bytes=uniform:5,steps=10")
    assert (made.bitops, made.size_bytes, made.steps) == (1e9, "uniform:5", 10)
    assert budget_name("bitops=1e9,bytes=uniform:5") == "bitops-1e9-bytes-uniform-5"
    for text in ("", "six", "steps=uniform:2", "bitops=1,bitops=2"):
        with pytest.raises(InputError, match="budget"):
            parse_budget(text)


def test_the_gene_that_decides_comes_first():
    rng = np.random.default_rng(0)
    records = []
    for _ in range(80):
        genes = {"t0": int(rng.integers(0, 100)), "conv.w": int(rng.choice([8, 4])), "other.a": int(rng.choice([8, 4]))}
        records.append({"genes": genes, "fitness": 8 - genes["conv.w"] + 0.3 * rng.normal()})
    records.append({"genes": records[0]["genes"], "fitness": float("inf")})
    effects = gene_effects(records)
    assert effects[0].gene == "conv.w" and effects[0].share > 0.5 and effects[0].trend < -0.5
    assert all(effect.share < 0.2 for effect in effects[1:])
    with pytest.raises(InputError, match="at least ten"):
        gene_effects(records[:5])
    assert kind_of("up_blocks.0.resnets.0.conv_shortcut", False) == "shortcuts"
