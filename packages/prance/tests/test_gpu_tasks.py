"""The tasks of the GPU queue run at tiny size on the CPU; the table has every line."""

import json

import pytest
from papercore.errors import InputError
from papercore.gpu import Request
from prance.benchmark import COLUMNS, PEER, Sizes, benchmark, per_image
from prance.gpu_tasks import equal_macs, tasks
from prance.macs import macs


@pytest.mark.parametrize("task", tasks(), ids=lambda task: task.name)
def test_task(task):
    result = task.run(Request("cpu", True, None))
    json.dumps(result)
    assert result


def test_benchmark(tmp_path):
    result = benchmark(Sizes(batch=3, repeats=2, tiny=True), out=tmp_path / "times.json")
    rows = result["table"].records()
    assert rows[0]["way"] == PEER
    assert rows[0][COLUMNS[3]] == 1
    names = {row["way"].split(", ")[-1] for row in rows}
    assert {"sliced", "cut out", "packed", "bucketed", "masked", "4 prototypes"} <= names
    assert len(result["ratios"]) >= 8
    stored = json.loads((tmp_path / "times.json").read_text())
    assert all(len(values) == 2 for values in stored["seconds"].values())
    for options in ({"batch": 0}, {"repeats": 0}):
        with pytest.raises(InputError, match="at least 1"):
            Sizes(**options)
    with pytest.raises(InputError, match="threads"):
        benchmark(Sizes(tiny=True), thread_count=0)


def test_decisions_of_a_given_mean():
    sizes = Sizes(tiny=True)
    net = sizes.network()
    full = float(macs(net, sizes_largest(sizes))) / 1e9
    decision = per_image(sizes.space, 16, 0.6 * full, net)
    assert abs(float(macs(net, decision).double().mean()) / 1e9 - 0.6 * full) < 0.03 * full
    assert len(decision.embed.unique(dim=0)) > 8
    static = equal_macs(net, sizes.space.embed[-1], 0.6 * full)
    assert abs(float(macs(net, static)) / 1e9 - 0.6 * full) < 0.05 * full


def sizes_largest(sizes: Sizes):
    from prance.decision import Decision

    return Decision.largest(sizes.space)
