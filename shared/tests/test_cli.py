"""Dataclass commands on the command line, in YAML and in Python; exit codes; one-line errors."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
from papercore import cli
from papercore.errors import InputError, WorkError
from papercore.report import Table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Add(cli.Command):
    """Add two numbers.

    The longer story.
    """

    a: int
    """the first"""
    b: int = 1
    """the second"""
    kind: Literal["plain", "table"] = "plain"
    """how to answer"""
    fail: str = ""
    """how to fail"""
    names: tuple[str, ...] = ()
    """a list"""
    seed: int = 0
    """a seed"""

    def run(self) -> Mapping[str, Any]:
        if self.fail == "input":
            raise InputError("field x", where="f.json", found=1, expected="2")
        if self.fail == "work":
            raise WorkError("it broke")
        if self.fail == "partly":
            raise WorkError("it broke", result={"sum": 1})
        if self.fail == "write":
            Path("/dev/null/x").write_text("")
        if self.fail == "bug":
            raise KeyError("oops")
        if self.fail == "interrupt":
            raise KeyboardInterrupt
        if self.kind == "table":
            return {"rows": Table("t", ("x", "y"), [(1, float("nan")), (2, 0.123456)])}
        return {"sum": self.a + self.b, "where": Path("p"), "names": self.names}


def run(*arguments: str) -> int:
    return cli.main("papercore", {"add": Add}, "Adds.", arguments)


def test_results_for_people_and_machines(capsys):
    assert run("add", "--a", "2") == 0
    assert capsys.readouterr().out == "sum: 3\nwhere: p\nnames: \n"
    assert run("add", "--a", "2", "--b=5", "--json", "--names", "x", "y") == 0
    assert json.loads(capsys.readouterr().out) == {"sum": 7, "where": "p", "names": ["x", "y"]}
    assert run("add", "--a", "2", "--kind", "table") == 0
    assert "0.1235" in capsys.readouterr().out
    assert run("add", "--a", "2", "--kind", "table", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"rows": [{"x": 1, "y": None}, {"x": 2, "y": 0.123456}]}


def test_the_yaml_file_gives_defaults_and_the_command_line_wins(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("a: 10\nb: 20\n")
    assert run("add", "--config", str(file)) == 0
    assert "sum: 30" in capsys.readouterr().out
    assert run("add", f"--config={file}", "--b", "1") == 0
    assert "sum: 11" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("add",), ("--a",)),
        (("add", "--a", "x"), ("--a", "'x'")),
        (("add", "--a", "1", "--nope", "3"), ("--nope",)),
        (("add", "--a", "1", "--kind", "odd"), ("odd", "plain", "table")),
        (("subtract",), ("unknown command subtract", "one of add")),
        (("add", "--a", "1", "--fail", "input"), ("f.json: field x: found 1, expected 2",)),
        (("add", "--config", "absent.yaml"), ("absent.yaml: cannot be read",)),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(capsys, arguments, words):
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    for word in words:
        assert word in err


def test_wrong_yaml_is_one_line_and_exit_code_2(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("a: ten\n")
    assert run("add", "--config", str(tmp_path / "c.yaml")) == 2
    assert capsys.readouterr().err.endswith("c.yaml: field a: found 'ten' (str), expected whole number\n")


@pytest.mark.parametrize(("fail", "word"), [("work", "it broke"), ("bug", "KeyError"), ("interrupt", "interrupted")])
def test_failed_work_is_exit_code_1(capsys, fail, word):
    assert run("add", "--a", "1", "--fail", fail) == 1
    assert word in capsys.readouterr().err


def test_what_there_is_is_shown_when_the_rest_failed(capsys):
    assert run("add", "--a", "1", "--fail", "partly", "--json") == 1
    out, err = capsys.readouterr()
    assert json.loads(out) == {"sum": 1}
    assert err == "error: it broke\n"


def test_unusable_paths_and_seeds_are_one_line(tmp_path, capsys):
    (tmp_path / "twice.yaml").write_text("a: 1\na: 2\n")
    (tmp_path / "empty.yaml").write_text("")
    for arguments, words in (
        (("--fail", "write"), "/dev/null/x: cannot be used"),
        (("--seed", "-1"), "--seed: found -1"),
        (("--seed", str(2**64)), "--seed"),
        (("--fail", "a\0b"), "--fail: found a null character"),
        (("--config", "x", "--config", "y"), "--config: found x and y"),
        (("--config=",), "--config: found nothing"),
        (("--config", str(tmp_path / "twice.yaml")), "twice.yaml:2: not YAML: found key a twice"),
        (("--config", str(tmp_path / "empty.yaml")), "empty.yaml: the whole file: found nothing"),
    ):
        assert run("add", "--a", "1", *arguments) == 2, arguments
        err = capsys.readouterr().err
        assert words in err
        assert err.count("\n") == 1


def test_frames_without_box_characters_are_understood():
    ascii_frame = (
        " Value error      \n ---------------- \n  Error parsing --a: no number.\n  -------\n  For full helptext\n"
    )
    assert cli.condense(ascii_frame) == "Error parsing --a: no number"
    assert cli.condense(" Odd: --x  \n") == "Odd: --x"


def test_help_and_version(capsys):
    assert run("--help") == 0
    assert "add  Add two numbers." in capsys.readouterr().out
    assert run("--version") == 0
    assert capsys.readouterr().out == "papercore 0.1.0\n"
    assert run() == 2
    capsys.readouterr()
    assert run("add", "--help") == 0
    text = capsys.readouterr().out
    assert "the second (default: 1)" in text
    assert "The longer story." in text
