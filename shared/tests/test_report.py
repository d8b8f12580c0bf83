"""Reports, reproductions, the digits and the GPU queue."""

import dataclasses
import json
import re
import subprocess
import sys
import time

import papercore.gpu as gpu
import pytest
import torch
from papercore.data.digits import classifier, digits, features
from papercore.errors import InputError, WorkError
from papercore.report import Picture, Section, Table, write_html, write_markdown
from papercore.reproduce import Claim, Paper, Reproduction, Settings, claims_table, installed, reproduce
from papercore.rundir import write_text


def picture() -> Picture:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1, 1))
    figure.add_subplot().plot([1, 2])
    return Picture.of_figure("a curve", figure, "it rises")


def test_the_page_is_self_contained_and_escaped(tmp_path):
    table = Table("<b>", ("x", "holds"), [("a|b <script>", "yes"), (0.12345678, None)])
    write_html(tmp_path / "r.html", "T & t", [Section("s", "text", [table], [picture()])], {"seed": 0})
    page = (tmp_path / "r.html").read_text()
    assert "<script>" not in page
    assert "T &amp; t" in page
    assert 'class="yes"' in page
    assert "0.1235" in page
    assert "data:image/png;base64," in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    write_markdown(tmp_path / "r.md", "T", [Section("my s", "text", [table], [picture()])])
    text = (tmp_path / "r.md").read_text()
    assert "| a\\|b <script> | yes |" in text
    assert (tmp_path / "r-my-s-0.png").read_bytes() == picture().png
    assert "![a curve](r-my-s-0.png)" in text


def test_tables_for_the_terminal_keep_every_word():
    text = Table("claims", ("a", "b"), [("[bold]x[/bold]", "long " * 30)]).to_terminal(60)
    assert "[bold]x[/bold]" in text
    assert text.count("long") == 30
    assert max(map(len, text.splitlines())) <= 60


def paper(name: str, run, scales=("tiny",)) -> Paper:
    return Paper(name, f"title of {name}", "nowhere", scales, run)


def test_reproductions_are_collected_and_one_failure_does_not_stop_the_others(tmp_path):
    claims = [Claim("C1", "it works", "1", "2", "more", True), Claim("C2", "it is fast", "1", "0", "more", False)]

    def breaks(settings):
        raise RuntimeError("no luck")

    said = []
    settings = Settings("tiny", tmp_path, None, "cpu", 0, said.append)
    papers = [
        paper("broken", breaks),
        paper("good", lambda s: Reproduction(claims, pictures=[picture()], text="words")),
        paper("big", breaks, scales=("full",)),
    ]
    with pytest.raises(WorkError) as caught:
        reproduce(papers, settings)
    assert str(caught.value) == "broken: RuntimeError('no luck'); big: has no tiny reproduction (has: full)"
    assert caught.value.result is not None
    table = caught.value.result["claims"]
    assert [row[0] for row in table.rows] == ["good", "good"]
    assert [row[-1] for row in table.rows] == ["yes", "no"]
    page = (tmp_path / "report.html").read_text()
    assert "it is fast" in page
    assert "no luck" in page
    record = json.loads((tmp_path / "claims.json").read_text())
    assert [claim["holds"] for claim in record["claims"]] == [True, False]
    assert record["errors"].keys() == {"broken", "big"}
    assert claims_table(claims).rows[0][0] == "C1"
    assert len(reproduce(papers[1:2], settings).rows) == 2


def test_wrong_input_of_one_paper_is_wrong_input_of_the_command(tmp_path):
    def refuses(settings):
        raise InputError("--data", found="nothing", expected="a folder")

    settings = Settings("tiny", tmp_path, None, "cpu", 0, lambda text: None)
    with pytest.raises(InputError, match="needs: --data: found nothing"):
        reproduce([paper("needs", refuses)], settings)
    assert (tmp_path / "report.html").exists()


def test_unknown_papers_are_named():
    with pytest.raises(InputError, match="--only: found nothing-like-it"):
        installed(["nothing-like-it"])


def test_digits():
    whole, train, test = digits("all"), digits("train"), digits("test")
    assert whole.images.shape == (1797, 1, 8, 8)
    assert len(train.labels) + len(test.labels) == 1797
    assert whole.images.min() == -1
    assert whole.images.max() == 1
    train.images.zero_()
    assert digits("train").images.abs().sum() > 0
    accuracy = (classifier()(test.images).argmax(1) == test.labels).float().mean()
    assert accuracy >= 0.98
    assert features(test.images).shape == (359, 64)
    assert features(test.images[:0]).shape == (0, 64)


# ---- the GPU queue, on the CPU


class FakePoint:
    name = "papercore"

    def __init__(self, tasks):
        self.tasks = tasks

    def load(self):
        return lambda: self.tasks


def task(name, value, **options) -> gpu.Task:
    return gpu.Task(name, "check", value, options.pop("minutes", 0.1), lambda request: {}, **options)


@pytest.fixture
def entries(monkeypatch, tmp_path):
    def make(tasks):
        monkeypatch.setattr(gpu.importlib.metadata, "entry_points", lambda **_: [FakePoint(tasks)])
        return gpu.queue(tmp_path)

    return make


REQUEST = gpu.Request("cpu", False, None)


def statuses(table: Table) -> dict[str, str]:
    return {row[0].partition("/")[2]: row[4] for row in table.rows}


def test_the_most_valuable_work_comes_first_and_what_does_not_fit_waits(entries, monkeypatch):
    ran = []
    monkeypatch.setattr(
        gpu, "run_one", lambda entry, seconds, request, final: (ran.append(entry.task.name), ("done", ""))[1]
    )
    tasks = [task("low", 1), task("high", 9), task("long", 5, minutes=60), task("odd", 7, requires=("no_such_module",))]
    tasks.append(task("data", 6, needs_data=True))
    table = gpu.run_queue(entries(tasks), 1, REQUEST, lambda text: None)
    assert ran == ["high", "low"]
    notes = {row[0].partition("/")[2]: row[5] for row in table.rows}
    assert notes["odd"] == "needs no_such_module"
    assert notes["data"] == "needs --data"
    assert notes["long"].startswith("needs 60 min")


def test_results_are_kept_and_old_versions_run_again(entries, monkeypatch, tmp_path):
    ran = []

    def run_one(entry, seconds, request, final):
        ran.append(entry.task.name)
        status = "failed" if entry.task.name == "bad" else "done"
        gpu.write_json(entry.result(request), {"status": status, "version": entry.task.version})
        return status, ""

    monkeypatch.setattr(gpu, "run_one", run_one)
    tasks = [task("a", 2), task("bad", 1)]
    gpu.run_queue(entries(tasks), 1, REQUEST, lambda text: None)
    assert statuses(gpu.run_queue(entries(tasks), 1, REQUEST, lambda text: None)) == {"a": "done", "bad": "failed"}
    assert ran == ["a", "bad"]
    gpu.run_queue(entries(tasks), 1, REQUEST, lambda text: None, retry=True)
    assert ran == ["a", "bad", "bad"]
    gpu.run_queue(entries([dataclasses.replace(tasks[0], version=2)]), 1, REQUEST, lambda text: None)
    assert ran[-1] == "a"
    gpu.run_queue(entries(tasks), 1, gpu.Request("cpu", True, None), lambda text: None)
    assert ran.count("a") == 3  # a result at full size says nothing about a tiny run, and the other way round
    gpu.run_queue(entries(tasks), 1, gpu.Request("cuda", False, None), lambda text: None)
    assert ran.count("a") == 4  # nor one on the CPU about the GPU
    assert sorted(path.name for path in (tmp_path / "papercore").glob("a*")) == [
        "a.cpu.json",
        "a.cpu.tiny.json",
        "a.json",
    ]


def test_a_task_that_hangs_costs_only_itself(entries, monkeypatch, tmp_path):
    real = subprocess.run
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(gpu.subprocess, "run", lambda command, **options: real(sleeper, **options))
    (entry,) = entries([task("hangs", 1)])
    begun = time.monotonic()
    assert gpu.run_one(entry, 0.5, REQUEST)[0] == "timeout"
    assert time.monotonic() - begun < 20
    assert json.loads(entry.result(REQUEST).read_text())["status"] == "timeout"


def test_work_cut_off_by_the_end_of_the_time_stays_pending(entries, monkeypatch):
    real = subprocess.run
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(gpu.subprocess, "run", lambda command, **options: real(sleeper, **options))
    tasks = [task("slow", 1, minutes=0.001)]
    table = gpu.run_queue(entries(tasks), 0.01, REQUEST, lambda text: None)
    assert statuses(table) == {"slow": "pending"}
    assert "cut off" in table.rows[0][5]
    assert statuses(gpu.list_queue(entries(tasks), REQUEST)) == {"slow": "pending"}


def test_damaged_results_and_odd_times_are_named(entries, tmp_path):
    (entry,) = entries([task("a", 1)])
    for damage in ("[]", "{}", '{"status": "great"}'):
        write_text(entry.result(REQUEST), damage)
        with pytest.raises(InputError, match=r"a\.cpu\.json: status"):
            gpu.list_queue([entry], REQUEST)
    for minutes in (float("nan"), 0.0, float("inf")):
        with pytest.raises(InputError, match="--minutes"):
            gpu.run_queue([entry], minutes, REQUEST, lambda text: None)
    with pytest.raises(InputError, match="--data"):
        gpu.run_queue([entry], 1, gpu.Request("cpu", False, tmp_path / "absent"), lambda text: None)


def test_own_tasks_run_on_the_cpu_at_tiny_size(tmp_path):
    found = gpu.queue(tmp_path, ["papercore"])
    names = ["check-quantisers", "check-kernels", "check-training", "benchmark-fake-quantize"]
    assert [entry.task.name for entry in found] == names
    table = gpu.run_queue(found, 5, gpu.Request("cpu", True, None), lambda text: None)
    assert statuses(table) == dict.fromkeys((entry.task.name for entry in found), "done"), table.rows
    record = json.loads((tmp_path / "papercore" / "check-quantisers.cpu.tiny.json").read_text())
    assert record["result"]["differing"] == 0
    assert record["device"] == "cpu"
    with pytest.raises(InputError, match="--only"):
        gpu.queue(tmp_path, ["papercore/none"])


def test_a_failing_check_is_recorded_with_its_reason(entries, monkeypatch, tmp_path):
    real = subprocess.run
    broken = [sys.executable, "-c", "raise AssertionError('3 of 9 differ')"]
    monkeypatch.setattr(gpu.subprocess, "run", lambda command, **options: real(broken, **options))
    (entry,) = entries([task("fails", 1)])
    status, note = gpu.run_one(entry, 30, REQUEST)
    assert status == "failed"
    assert "3 of 9 differ" in note
    assert "3 of 9 differ" in json.loads(entry.result(REQUEST).read_text())["error"]


def test_torch_is_what_the_checks_measure():
    from papercore.gpu_checks import milliseconds

    assert milliseconds(lambda: torch.ones(10).sum(), "cpu", repeats=3) > 0
