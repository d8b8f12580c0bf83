"""Run folders, logs, images, configuration files: whole or absent, and every damage named."""

import dataclasses
import json
import zipfile
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from papercore.config import build, load_yaml
from papercore.errors import InputError, located
from papercore.images import (
    grid_png,
    images_from_uint8,
    images_to_uint8,
    png,
    read_images,
    write_images,
)
from papercore.rundir import (
    RunDir,
    append_line,
    atomic,
    check_output_file,
    check_output_folder,
    read_json,
    read_lines,
    write_json,
    write_text,
)


def test_atomic_write_leaves_the_old_file_when_the_block_fails(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(ZeroDivisionError), atomic(path) as temporary:
        temporary.write_text("half")
        _ = 1 / 0
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


RECORDS = st.lists(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=8)), max_size=5)


@given(RECORDS, st.integers(0, 40))
@settings(deadline=None)
def test_a_torn_last_line_is_dropped_and_overwritten(tmp_path_factory, records, cut):
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    for record in records:
        append_line(path, record)
    assert read_lines(path) == records
    if records:
        whole = path.read_bytes()
        line = len(whole.splitlines(keepends=True)[-1])
        path.write_bytes(whole[: len(whole) - 1 - cut % line])  # the newline at least
        kept = records[:-1]
        assert read_lines(path) == kept
        append_line(path, {"next": 1})
        assert read_lines(path) == [*kept, {"next": 1}]


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"a": 1}\nnonsense\n{"b": 2}\n')
    with pytest.raises(InputError, match=r"log\.jsonl:2: not JSON"):
        read_lines(path)


def test_a_run_goes_on_only_under_its_own_configuration(tmp_path):
    run = RunDir.open(tmp_path / "run", {"steps": 3, "lr": 0.1})
    run.log({"step": 1})
    assert RunDir.open(tmp_path / "run", {"steps": 3, "lr": 0.1}).records() == [{"step": 1}]
    with pytest.raises(InputError, match=r"config\.json: field steps: found 3, expected 4"):
        RunDir.open(tmp_path / "run", {"steps": 4, "lr": 0.1})
    assert RunDir.open(tmp_path / "run", {"steps": 4, "lr": 0.1}, resume=False).records() == []
    assert set(read_json(tmp_path / "run" / "environment.json")) >= {"python", "packages"}
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        RunDir.open(tmp_path / "file", {})


def test_json_errors_name_file_and_line(tmp_path):
    (tmp_path / "bad.json").write_text('{\n"a": }')
    with pytest.raises(InputError, match=r"bad\.json:2: not JSON"):
        read_json(tmp_path / "bad.json")
    with pytest.raises(InputError, match=r"absent\.json: cannot be read"):
        read_json(tmp_path / "absent.json")
    (tmp_path / "twice.json").write_text('{"a": 1, "a": 2}')
    with pytest.raises(InputError, match=r"twice\.json: key a: found given twice"):
        read_json(tmp_path / "twice.json")
    write_json(tmp_path / "good.json", {"path": Path("x")})
    assert read_json(tmp_path / "good.json") == {"path": "x"}


@dataclasses.dataclass(frozen=True)
class Inner:
    x: float = 0.0


@dataclasses.dataclass(frozen=True)
class Settings:
    steps: int
    rate: float = 0.1
    out: Path | None = None
    kind: Literal["a", "b"] = "a"
    names: tuple[str, ...] = ()
    flag: bool = False
    inner: Inner = Inner()


def test_values_are_converted_to_what_the_fields_say():
    built = build(Settings, {"steps": 3, "rate": 1, "out": "x/y", "names": ["p", "q"], "inner": {"x": 2}}, "file.yaml")
    assert built == Settings(3, 1.0, Path("x/y"), "a", ("p", "q"), False, Inner(2.0))
    assert build(Settings, {"steps": 3, "rate": "1e-3"}, "f").rate == 1e-3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "file.yaml: field steps: found nothing, expected a value"),
        ({"steps": "ten"}, "file.yaml: field steps: found 'ten' (str), expected whole number"),
        ({"steps": True}, "file.yaml: field steps: found True (bool), expected whole number"),
        ({"steps": 1, "kind": "c"}, "file.yaml: field kind: found 'c' (str), expected 'a' or 'b'"),
        ({"steps": 1, "names": "p"}, "file.yaml: field names: found 'p' (str), expected list of text"),
        ({"steps": 1, "inner": {"y": 1}}, "file.yaml: inner: field y: found a name that does not exist"),
        ({"step": 1}, "did you mean steps?"),
        ([1], "file.yaml: the whole file: found [1], expected a mapping"),
    ],
)
def test_wrong_values_are_named(values, message):
    with pytest.raises(InputError) as caught:
        build(Settings, values, "file.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_yaml_errors_name_file_and_line(tmp_path):
    (tmp_path / "bad.yaml").write_text("a: 1\nb: [1\n")
    with pytest.raises(InputError, match=r"bad\.yaml:\d+: not YAML"):
        load_yaml(tmp_path / "bad.yaml")


def test_outputs_are_checked_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    check_output_folder(tmp_path / "a" / "b")
    check_output_file(tmp_path / "c" / "d.npz", ".npz")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    for call, words in (
        (lambda: check_output_folder(tmp_path / "file"), "is a file"),
        (lambda: check_output_folder(tmp_path / "file" / "x"), "is a file"),
        (lambda: check_output_file(tmp_path), "is a folder"),
        (lambda: check_output_file(Path()), "is a folder"),
        (lambda: check_output_file(tmp_path / "x.png", ".npz"), "found .png, expected .npz"),
        (lambda: check_output_file(tmp_path / "file" / "x"), "is a file"),
    ):
        with pytest.raises(InputError, match=words):
            call()


def test_located_adds_the_file_once():
    with pytest.raises(InputError, match=r"^outer: x: found 1"), located("outer"):
        raise InputError("x", found=1)
    with pytest.raises(InputError, match=r"^inner: x"), located("outer"):
        raise InputError("x", where="inner")


def test_images_round_trip(tmp_path):
    images = torch.arange(2 * 3 * 4 * 1, dtype=torch.uint8).reshape(2, 3, 4, 1)
    write_images(tmp_path / "i.npz", images)
    assert torch.equal(read_images(tmp_path / "i.npz"), images)
    assert torch.equal(images_to_uint8(images_from_uint8(images)), images)


def save_one_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: p.write_bytes(b"nonsense"), "cannot be read as .npz"),
        (lambda p: np.savez(p, other=np.zeros(1)), "key arr_0: found other"),
        (lambda p: np.savez(p, arr_0=np.zeros((1, 2, 2, 3))), "found float64 (1, 2, 2, 3)"),
        (lambda p: np.savez(p, arr_0=np.array([{}], dtype=object)), "cannot be read as .npz"),
        (lambda p: p.write_bytes(p.with_name("good.npz").read_bytes()[:-40]), "cannot be read as .npz"),
        (lambda p: None, "cannot be read as .npz"),
        (save_one_array, "a single array"),
        (lambda p: zipfile.ZipFile(p, "w").writestr("arr_0", "text"), "key arr_0: found bytes"),
    ],
)
def test_damaged_image_files_are_named(tmp_path, write, message):
    write_images(tmp_path / "good.npz", torch.zeros(1, 2, 2, 1, dtype=torch.uint8))
    write(tmp_path / "bad.npz")
    with pytest.raises(InputError) as caught:
        read_images(tmp_path / "bad.npz")
    assert "bad.npz" in str(caught.value)
    assert message in str(caught.value)


def test_pictures():
    import io

    from PIL import Image

    images = torch.zeros(3, 2, 2, 1, dtype=torch.uint8)
    picture = np.asarray(Image.open(io.BytesIO(grid_png(images, 2, zoom=3))))
    assert picture.shape == (2 * 7 + 1, 2 * 7 + 1)
    assert (picture[1:7, 1:7] == 0).all()
    assert (picture[8:, 8:] == 255).all()
    colour = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png(colour)))), colour)
    with pytest.raises(InputError, match="picture grid"):
        grid_png(images[:0], 2)


def test_append_is_readable_line_by_line(tmp_path):
    append_line(tmp_path / "l", {"a": Path("x")})
    assert json.loads((tmp_path / "l").read_text()) == {"a": "x"}
