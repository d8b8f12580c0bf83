"""The `papercore` command as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import torch


def papercore(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "papercore", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


def test_reproduce_measures_a_package_and_writes_one_page(tmp_path):
    done = papercore("reproduce", "--only", "qdit", "--out", tmp_path, "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    claims = json.loads(done.stdout)["claims"]
    assert [claim["claim"] for claim in claims if claim["package"] == "qdit"] == [
        "C1",
        "C2",
        "C3",
        "C4",
        "C5",
        "C6",
        "C7",
    ]
    # exact by construction, whatever the machine; the others are measurements and may fail honestly
    assert all(claim["holds"] == "yes" for claim in claims if claim["claim"] in ("C6", "C7"))
    assert "settings" in done.stderr
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "W4A8: smaller groups reduce the error" in page
    assert (tmp_path / "report.md").exists()
    # everything is there for a second look: the trained model is not trained again
    assert (tmp_path / "qdit" / "model-seed0" / "config.json").exists()


def test_wrong_options_of_papercore(tmp_path):
    for arguments, words in (
        (("reproduce", "--only", "nothing"), "--only: found nothing"),
        (("reproduce", "--scale", "huge"), "huge"),
        (("gpu", "--only", "nothing", "--results", tmp_path), "--only: found nothing"),
        *(() if torch.cuda.is_available() else ((("gpu", "--results", tmp_path), "no CUDA GPU"),)),
        (("gpu", "--list"), "no checkout of the workspace"),
    ):
        done = papercore(*arguments, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert words in done.stderr
        assert done.stderr.count("\n") == 1


def test_the_queue_is_listed_from_anywhere_in_the_checkout():
    done = papercore("gpu", "--list", "--json", cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["queue"]
    assert [row["value"] for row in rows] == sorted((row["value"] for row in rows), reverse=True)
    assert {"papercore/check-quantisers", "qdit/check-layer"} <= {row["task"] for row in rows}
