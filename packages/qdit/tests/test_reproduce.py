"""The reproduction judges by its criteria; the GPU tasks run at tiny size."""

import dataclasses

import papercore.gpu as gpu
from qdit import reproduce
from qdit.gpu_tasks import reproduce_small, tasks


def rows(**changes) -> dict[str, reproduce.Row]:
    errors = dict.fromkeys(reproduce.GRID, 1.0) | {
        "W4A8 row": 1.0,
        "W4A8 g32": 0.8,
        "W4A8 g16": 0.48,
        "W4A8 g32 GPTQ": 0.48,
        "W16A8 g32 static": 1.0,
        "W16A8 g32": 0.5,
    }
    made = {name: reproduce.Row(name, config, errors[name], 10.0, 1.0) for name, config in reproduce.GRID.items()}
    for name, change in changes.items():
        made[name.replace("_", " ")] = dataclasses.replace(made[name.replace("_", " ")], **change)
    return made


def verdicts(of) -> dict[str, bool]:
    return {claim.name: claim.holds for claim in reproduce.judge(of, (10.0, 1.0))}


def test_claims_hold_at_their_limits_and_fail_beyond():
    assert verdicts(rows()) == {"C1": True, "C2": True, "C3": True, "C5": True}
    assert not verdicts(rows(W4A8_g16={"error": 0.49}))["C1"]
    assert not verdicts(rows(W16A8_g32={"error": 0.51}))["C2"]
    assert not verdicts(rows(W4A8_g32_GPTQ={"error": 0.49}))["C3"]
    assert not verdicts(rows(W8A8_g32={"frechet": 10.6}))["C5"]
    assert not verdicts(rows(W6A8_g32={"frechet": 11.1}))["C5"]


def test_integer_products_and_checkpoints_are_measured(model, inputs):
    wide = dataclasses.replace(inputs)
    from diffusers import DiTTransformer2DModel

    config = {k: v for k, v in dict(model.config).items() if not k.startswith("_")} | {"attention_head_dim": 32}
    big = DiTTransformer2DModel(**config).eval()
    assert reproduce.integer_claim(big, wide).holds
    claim = reproduce.checkpoint_claim(big, wide)
    assert claim.holds, claim.measured


def test_the_gpu_tasks_run_on_the_cpu_at_tiny_size(tmp_path):
    entries = gpu.queue(tmp_path, ["qdit"])
    assert {entry.task.name for entry in entries} == {task.name for task in tasks()}
    table = gpu.run_queue(entries, 5, gpu.Request("cpu", True, None), lambda text: None)
    assert {row[0]: row[4] for row in table.rows} == {
        entry.name: "pending" if entry.task.needs_data else "done" for entry in entries
    }, table.rows


def test_the_small_reproduction_runs_from_the_queue(data):
    found = reproduce_small(gpu.Request("cpu", True, data))
    assert [claim["name"] for claim in found["claims"]] == ["C1", "C2", "C3", "C4", "C5"]
    assert len(found["tables"]["CIFAR-10, every setting"]) == 19
