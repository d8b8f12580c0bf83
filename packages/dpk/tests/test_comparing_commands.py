"""`dpk compare`, `dpk cka`, `dpk convert-config` and `dpk benchmark` from end to end."""

import json

import pytest
import torch
import yaml
from dpk.cli import COMMANDS
from dpk.digits import digits_net
from dpk.distiller import Distiller
from dpk.networks import create_model
from dpk.protocol import PAIRS, method_options, stage_name
from dpk.recipe import make_method, read_recipe
from papercore import cli
from safetensors.torch import save_file


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "small.safetensors"
    save_file(digits_net("small", 1).state_dict(), path)
    return path


def call(capsys, *arguments) -> dict:
    code = cli.main("dpk", COMMANDS, "", [*map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


def test_compare_adds_methods_and_seeds_to_what_is_there(capsys, tmp_path, teacher):
    arguments = ("compare", "--teacher", "digits_small", "--teacher-weights", teacher, "--epochs", 1, "--limit", 64)
    arguments += ("--batch-size", 32, "--device", "cpu", "--out", tmp_path)
    alone = call(capsys, *arguments, "--methods", "ce", "--seeds", 2)["table"]
    both = call(capsys, *arguments, "--methods", "ce, at", "--seeds", 2)["table"]
    assert both[0]["last epoch"] == alone[0]["last epoch"]
    assert [row["method"] for row in both] == ["ce", "at"]
    assert "±" in both[1]["best epoch (chosen on the test set)"]
    assert {path.name for path in tmp_path.iterdir()} >= {"ce-seed0", "ce-seed1", "at-seed0", "at-seed1", "table.json"}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"{{student: digits_student, teacher: digits_small, teacher_weights: {teacher}, dataset: digits, method: kd,\n"
        "options: {temperature: 2.0}, solver: {epochs: 1, batch_size: 32, schedule: constant}}\n"
    )
    given = ("compare", "--recipe", recipe, "--limit", 64, "--seeds", 1, "--device", "cpu", "--methods", "kd")
    table = call(capsys, *given, "--out", tmp_path / "by-recipe")["table"]
    assert [row["method"] for row in table] == ["kd"]
    assert "±" not in table[0]["last epoch"]


def test_layers_of_two_networks(capsys, tmp_path, teacher):
    arguments = ("cka", "digits_small", "digits_student", "--first-weights", teacher, "--images", 40)
    found = call(capsys, *arguments, "--batch-size", 16, "--device", "cpu", "--out", tmp_path)
    assert found["pictures"] == 40
    record = json.loads((tmp_path / "cka.json").read_text())
    assert record["networks"] == ["digits_small", "digits_student"]
    assert record["batches"] == 3
    assert len(record["cka"]) == len(record["first"])
    assert found["layers"] == f"{len(record['first'])} x {len(record['second'])}"


def test_a_converted_configuration_is_a_recipe(capsys, tmp_path):
    source, out = tmp_path / "fitnet.yaml", tmp_path / "recipe.yaml"
    source.write_text(
        "DISTILLER: {TYPE: FITNET, TEACHER: resnet56, STUDENT: resnet20}\n"
        "FITNET: {HINT_LAYER: 1}\nSOLVER: {LR: 0.1, NOTHING: 3}\n"
    )
    found = call(capsys, "convert-config", source, "--out", out)
    assert found["left out"] == ["SOLVER.NOTHING"]
    recipe = read_recipe(out)
    assert recipe.solver.learning_rate == 0.1
    assert recipe.solver.weight_decay == 1e-4  # the format's default
    assert [(pair.student, pair.teacher) for pair in recipe.build_method().pairs] == [("layer1", "layer1")]
    assert yaml.safe_load(out.read_text())["method"] == "fitnet"


def test_hints_of_the_protocol_are_modules_at_the_known_sizes():
    sizes = {"resnet20": 16, "resnet50": 16, "wrn_16_2": 16, "vgg8": 8, "mobilenetv2": 8, "shufflenetv1": 8}
    for name, size in sizes.items():
        model, seen = create_model(name, 5).eval(), []
        model.get_submodule(stage_name(name, 2)).register_forward_hook(lambda m, x, y, seen=seen: seen.append(y.shape))
        with torch.no_grad():
            model(torch.randn(1, 3, 32, 32))
        assert seen[0][2:] == (size, size), name
    for pair in PAIRS:
        (hint,) = make_method("fitnet", method_options("fitnet", pair)).pairs
        assert (hint.student, hint.teacher) == (stage_name(pair.student, 2), stage_name(pair.teacher, 2))


def test_the_student_of_knowledge_review_is_tapped_after_the_activation():
    student, teacher = create_model("resnet8", 5), create_model("resnet8", 5)
    options = method_options("reviewkd") | {"ce_weight": 0}
    distiller = Distiller(student, teacher, make_method("reviewkd", options), torch.zeros(2, 3, 32, 32))
    images = torch.randn(2, 3, 32, 32)
    ours, theirs = distiller.run(0, images).features, distiller.teach(images).features
    assert all(float(x.detach().min()) == 0 for x in ours)
    assert all(float(x.min()) < 0 for x in theirs)


def test_steps_are_timed(capsys):
    arguments = ("--teacher", "resnet8", "--student", "resnet8", "--batch-size", 4, "--repetitions", 1)
    table = call(capsys, "benchmark", *arguments, "--device", "cpu")["steps"]
    assert all(row["ms a step"] > 0 for row in table)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compare", "--out", "o"), "method kd: found no trained teacher"),
        (("compare", "--out", "o", "--methods", "ce,ce"), "--methods: found ce,ce"),
        (("compare", "--out", "o", "--methods", "xx"), "method: found xx"),
        (("compare", "--out", "o", "--methods", "ce", "--seeds", 0), "--seeds: found 0"),
        (("compare", "--out", "o", "--methods", "ce", "--limit", 0), "--limit: found 0"),
        (("compare", "--out", "o", "--methods", "ce", "--student", "resnet20"), "network: found resnet20"),
        (("cka", "digits_small", "resnet20", "--out", "o"), "network: found resnet20"),
        (("cka", "digits_small", "digits_small", "--out", "o", "--batch-size", 3), "--batch-size, --images"),
        (("convert-config", "none.yaml", "--out", "o.yaml"), "none.yaml"),
        (("benchmark", "--batch-size", 2), "at least 4"),
    ],
)
def test_wrong_options_are_told_in_a_line(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main("dpk", COMMANDS, "", list(map(str, arguments))) == 2
    assert message in capsys.readouterr().err
