"""The commands that search, export, compare, profile and time."""

import json
import sys

import pytest
import torch
from oneshot_mpq import BitConfig, Supernet, report, save_supernet
from oneshot_mpq.cli import main
from oneshot_mpq.cost import CostModel
from oneshot_mpq.models import seeded_model


def run(monkeypatch, capsys, *arguments):
    """Exit code, and the JSON or the message."""
    monkeypatch.setattr(sys, "argv", ["oneshot-mpq", *map(str, arguments), "--json"])
    code = main()
    out, err = capsys.readouterr()
    return code, json.loads(out) if code == 0 else err + out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An untrained supernet as train writes it."""
    path = tmp_path_factory.mktemp("net")
    torch.manual_seed(0)
    net = Supernet(seeded_model("digits", 10, 1, 0), torch.randn(2, 1, 8, 8), name="digits")
    net.calibrate(torch.randn(8, 1, 8, 8))
    notes = {"dataset": "digits", "seed": 0, "size": 8, "limit": None}
    save_supernet(net, path, architecture={"name": "digits", "classes": 10, "channels": 1}, notes=notes)
    return path, net


def test_search_then_export_then_compare(folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnx")
    path, net = folder
    budgets = [BitConfig.uniform(net, b, b).bitops_G for b in (4, 5)]
    found = tmp_path / "found"
    options = ["--images", 16, "--recalibration", 100, "--method", "random", "--evaluations", 5]
    code, told = run(monkeypatch, capsys, "search", path, "--out", found, "--budget", *budgets, *options)
    assert code == 0, told
    configs = sorted(found.glob("bitops_G-*.json"))
    assert len(configs) == 2 and told["front"] and json.loads((found / "log.json").read_text())["measured"]
    file = tmp_path / "net.onnx"
    code, told = run(monkeypatch, capsys, "export", path, configs[0], "--out", file, "--recalibration", 100)
    assert code == 0 and file.stat().st_size > 0, told
    code, told = run(monkeypatch, capsys, "compare", *configs)
    assert code == 0 and any(row[""] == "BitOps (G)" for row in told["totals"]), told


def test_profile_by_name_and_of_a_configuration(folder, tmp_path, monkeypatch, capsys):
    path, net = folder
    code, told = run(monkeypatch, capsys, "profile", "cifar-resnet20")
    assert code == 0 and len(told["layers"]) == 20 and len(told["uniform"]) == 5, told
    config = BitConfig.uniform(net, 3, 5)
    config.save(tmp_path / "c.json")
    code, told = run(monkeypatch, capsys, "profile", path, "--bitconfig", tmp_path / "c.json")
    assert code == 0 and told["totals"][0]["BitOps (G)"] == pytest.approx(config.bitops_G), told
    code, told = run(monkeypatch, capsys, "profile", "no-such-model")
    assert code == 2 and "no-such-model" in told


def test_benchmark_tells_ratios(monkeypatch, capsys):
    code, told = run(monkeypatch, capsys, "benchmark", "--elements", 1000, "--repeats", 1)
    assert code == 0 and {"ours", "eager formula"} <= {row[""] for row in told["quantiser 1000"]}, told
    assert run(monkeypatch, capsys, "benchmark", "--repeats", 0)[0] == 2


def test_wrong_files_are_named(folder, tmp_path, monkeypatch, capsys):
    path, net = folder
    (tmp_path / "no.json").write_text("{}")
    code, told = run(monkeypatch, capsys, "export", path, tmp_path / "no.json", "--out", tmp_path / "a.onnx")
    assert code == 2 and "format" in told
    config = BitConfig.uniform(net, 3, 3)
    config.save(tmp_path / "c.json")
    code, told = run(monkeypatch, capsys, "export", path, tmp_path / "c.json", "--out", tmp_path)
    assert code == 2 and "--out" in told
    other = json.loads((tmp_path / "c.json").read_text()) | {"model": "other"}
    (tmp_path / "o.json").write_text(json.dumps(other))
    code, told = run(monkeypatch, capsys, "compare", tmp_path / "c.json", tmp_path / "o.json")
    assert code == 2 and "one model" in told


def test_strict_costs_and_whole_populations(net):
    config, costs = BitConfig.of(net, [2, 3, 4], [6, 5, 4]), CostModel(net)
    strict, usual = costs.strict(config), costs.cost(config)
    first = net.macs["conv1"]
    assert strict.bitops_G - usual.bitops_G == pytest.approx(8 * (32 - 8) * first / 1e9)
    numbers = 2 * (8 + 8 + 16) + 10 + 5 + 4  # banks of a, d, p; bias of fc; weight steps; input steps
    assert strict.size_MiB - usual.size_MiB == pytest.approx(32 * numbers / 8 / 2**20)
    weight_bits, act_bits = [[2, 3, 4], [6, 6, 6]], [[6, 5, 4], [2, 3, 2]]
    for unit in ("bitops_G", "size_MiB"):
        found = costs.population(unit, weight_bits, act_bits)
        expected = [getattr(BitConfig.of(net, w, a), unit) for w, a in zip(weight_bits, act_bits, strict=True)]
        assert list(found) == pytest.approx(expected, rel=1e-12)


def test_a_report_tells_every_layer(net):
    layers, totals = report(net, BitConfig.of(net, [2, 3, 4], [6, 5, 4]))
    assert [row[0] for row in layers.rows] == ["a", "d", "p", "conv1", "fc"]
    assert [row[3] for row in layers.rows] == [6, 5, 4, "float", 8] and len(totals.rows) == 2


@pytest.mark.parametrize("name", ["check-quantiser", "benchmark-quantiser"])
def test_gpu_work_runs_at_tiny_size(name):
    from oneshot_mpq.gpu_tasks import tasks
    from papercore.gpu import Request

    (task,) = [task for task in tasks() if task.name == name]
    assert task.run(Request("cpu", True, None))
