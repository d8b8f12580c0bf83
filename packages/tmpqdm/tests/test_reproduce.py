"""The claims are judged by their criteria; the study runs from end to end at the smallest size."""

import dataclasses
import warnings

import papercore.gpu as gpu
from papercore.reproduce import Settings
from tmpqdm import reproduce
from tmpqdm.gpu_plan_tasks import check_sampling, tasks


def verdicts(**changes: float) -> dict[str, bool]:
    values = {
        "uniform 5 bits, quadratic list": 2.0,
        "uniform 5 bits, uniform list": 1.6,
        "uniform 5 bits, searched list": 1.5,
        "searched bits, quadratic list": 1.4,
        "both searched": 1.3,
    }
    for name, value in changes.items():
        values[name.replace("_", " ").replace("5 bits ", "5 bits, ").replace("bits quadratic", "bits, quadratic")] = (
            value
        )
    return {claim.name: claim.holds for claim in reproduce.judge(values, 5)}


def test_claims_hold_at_their_limits_and_fail_beyond():
    assert verdicts() == {"R1": True, "R2": True, "R3": True}
    assert not verdicts(uniform_5_bits_searched_list=1.51)["R1"]
    assert not verdicts(uniform_5_bits_uniform_list=1.5)["R1"]
    assert not verdicts(searched_bits_quadratic_list=1.41)["R2"]
    assert not verdicts(both_searched=1.4)["R3"]


def test_the_study_runs(tmp_path):
    effort = reproduce.Effort(2, (8, 6, 4), 6, 3, 4, 1, 120, 120, 1, 2, 6, mixture_iterations=2)
    said: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # an untrained network gives few new candidates
        found = reproduce.run_tiny(Settings("tiny", tmp_path, None, "cpu", 0, said.append), effort)
    assert [claim.name for claim in found.claims] == ["R1", "R2", "R3", "R4", "R5", "R6"]
    rows = {row["setting"]: row for row in found.tables[0].records()}
    assert len(rows) == 11 and rows["both searched"]["of the budget"] <= 1
    assert rows["searched bits, quadratic list"]["of the budget"] <= 1
    assert len(found.pictures) == 2 and said
    verdict = {claim.name: claim.holds for claim in found.claims}
    assert verdict["R6"]


def test_the_gpu_tasks_are_listed_and_run_on_the_cpu():
    assert dataclasses.asdict(tasks()[-1])["name"] == "reproduce-small"
    found = check_sampling(gpu.Request("cpu", True, None))
    assert found["worst relative difference"] < 1e-5
