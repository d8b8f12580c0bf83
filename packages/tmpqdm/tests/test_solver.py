"""The precision solver: what it holds, how it switches, and how it is calibrated."""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler
from diffusers.models.attention_processor import AttnAddedKVProcessor
from papercore.errors import InputError
from tmpqdm.calibration import CalibrationSet, collect_calibration
from tmpqdm.layers import QuantLayer
from tmpqdm.quantisers import tensor_parameters, weight_parameters
from tmpqdm.solver import PrecisionSolver
from tmpqdm.synthetic import random_mixture, tiny_dit, tiny_text_unet, tiny_unet
from torch import nn

BITS = (8, 6, 4)
MODELS = {"unet": tiny_unet, "text": tiny_text_unet, "dit": tiny_dit}


def inputs_for(name: str, model: nn.Module) -> CalibrationSet:
    cond = {"encoder_hidden_states": torch.randn(4, 5, 12)} if name == "text" else None
    labels = [1, 2] if name == "dit" else None
    return collect_calibration(model, DDPMScheduler(), samples=4, timesteps=[20, 300, 800], cond=cond, labels=labels)


@pytest.fixture(scope="module", params=MODELS)
def made(request):
    """(model, data, solver with whole ranges) of one family; tests leave the solver at any bits."""
    torch.manual_seed(1)
    model = MODELS[request.param]().eval()
    data = inputs_for(request.param, model)
    solver = PrecisionSolver.from_model(model, bits=BITS)
    solver.calibrate(data, method="minmax", batch_size=4)
    return model, data, solver


@pytest.fixture(scope="module")
def unet():
    model = tiny_unet().eval()
    return model, inputs_for("unet", model)


@torch.no_grad()
def run(model, data):
    return model(data.x, data.t, **data.cond).sample


def test_operations(made):
    model, _, solver = made
    names = [op.name for op in solver.ops]
    order = [name for name, _ in model.named_modules() if name in names]
    assert names == order and not solver.unused
    assert {op.genes for op in solver.ops} == {("w", "a"), ("q", "k", "v")}
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    assert [op.name for op in solver.ops if op.kind == "layer"] == layers
    assert all(attn in names and names.index(attn) < names.index(f"{attn}.to_q")
               for attn in names if f"{attn}.to_q" in names)  # fmt: skip


def test_the_model_is_left_alone_and_full_precision_is_exact(made):
    model, data, solver = made
    assert not any(isinstance(module, QuantLayer) for module in model.modules())
    with solver.full_precision() as network:
        torch.testing.assert_close(run(network, data), run(model, data), rtol=1e-4, atol=1e-5)
        assert solver.current is None
    assert solver.current is not None


def test_more_bits_less_error(made):
    model, data, solver = made
    exact, errors = run(model, data), []
    for bits in solver.bits:
        solver.set_uniform(bits)
        errors.append(float((run(solver.network, data) - exact).square().mean()))
    assert errors[0] < errors[1] < errors[2] and errors[0] < 0.1 * float(exact.square().mean())


def test_a_mixture_is_what_its_parts_say(made):
    """Against quantising the weights again and hooks that quantise the inputs."""
    model, data, solver = made
    mixture = random_mixture(solver, 3)
    for op in solver.ops:  # attention products stay in full precision in the reference
        if op.kind == "attention":
            solver.attentions[op.name].use(**dict.fromkeys(solver.attentions[op.name].genes))
    solver.set_uniform(4)
    solver.set_bits(mixture)
    assert solver.current == mixture
    slow = copy.deepcopy(model)
    for name, layer in solver.layers.items():
        w, a = mixture[name]["w"], mixture[name]["a"]
        target = slow.get_submodule(name)
        pieces = []
        for weight in layer.weights():
            delta, zero = weight_parameters(weight, w)
            pieces.append((((weight / delta).round() + zero).clamp(0, 2**w - 1) - zero) * delta)
        with torch.no_grad():
            target.weight.copy_(torch.cat(pieces, 1))

        def quantise(module, args, layer=layer, a=a):
            parts = args[0].split([layer.split, args[0].shape[1] - layer.split], 1) if layer.split else (args[0],)
            found = []
            for part, step in zip(parts, layer.step_halves(a), strict=True):
                low, high = -(2 ** (a - 1)), 2 ** (a - 1) - 1
                found.append((part / step.delta).round().clamp(low, high) * step.delta)
            return (torch.cat(found, 1),)

        target.register_forward_pre_hook(quantise)
    for attention in solver.attentions.values():
        attention.use(**dict.fromkeys(attention.genes))
    torch.testing.assert_close(run(solver.network, data), run(slow, data), rtol=1e-3, atol=1e-4)


def test_applied_networks_are_independent(made):
    model, data, solver = made
    mixture = random_mixture(solver, 5)
    network = solver.apply(mixture)
    assert type(network) is type(model)
    solver.set_bits(mixture)
    expected = run(solver.network, data)
    solver.set_uniform(4)
    assert torch.equal(run(network, data), expected)
    name = solver.ops[-1].name
    assert list(network.get_submodule(name).dense) == [mixture[name]["w"]]


def test_bits_for_every_step(made):
    _, data, solver = made

    steps = {t: random_mixture(solver, seed) for seed, t in enumerate((20, 300, 800))}
    plan = SimpleNamespace(per_step_bits=tuple({"timestep": t, "bits": bits} for t, bits in steps.items()))
    network = solver.apply(plan)
    for t, bits in steps.items():
        rows = data[data.t == t]
        solver.set_bits(bits)
        assert torch.equal(run(network, rows), run(solver.network, rows))
    with pytest.raises(InputError, match=r"timestep: found \[20, 300, 800\]"):
        run(network, data)
    with pytest.raises(InputError, match=r"timestep: found \[21\], expected one of \[20, 300, 800\]"):
        run(network, CalibrationSet(data.x[:1], torch.tensor([21]), {k: v[:1] for k, v in data.cond.items()}))


def test_in_a_pipeline(unet):
    model, data = unet
    solver = PrecisionSolver.from_model(model, bits=(8, 4))
    solver.calibrate(data, method="minmax", batch_size=4)
    images = []
    for network in (model, solver.apply(solver.uniform(8)), solver.apply(solver.uniform(4))):
        pipeline = DDIMPipeline(network, DDIMScheduler())
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images.append(pipeline(batch_size=8, num_inference_steps=2, output_type="np", generator=generator).images)
    assert 0 < abs(images[0] - images[1]).mean() < abs(images[0] - images[2]).mean()


def test_wrong_bits(made):
    *_, solver = made
    name = solver.ops[0].name
    attention = next(op.name for op in solver.ops if op.kind == "attention")
    for bits, message in (
        ({"nothing": {"w": 8}}, "operation nothing"),
        ({name: {"q": 8}}, f"gene q of {name}"),
        ({name: {"w": 5}}, r"w bits of .*: found 5, expected one of \[8, 6, 4\]"),
        ({attention: {"p": 6}}, "gene p"),
    ):
        with pytest.raises(InputError, match=message):
            solver.set_bits(bits)
    solver.set_bits({attention: {"p": 8}})  # the fixed softmax bits may stand in a plan
    with pytest.raises(InputError, match="bits"):
        solver.set_uniform(5)
    incomplete = solver.uniform(8)
    incomplete[name] = {"w": 8}
    with pytest.raises(InputError, match=f"bits of {name}: found no a"):
        solver.apply(incomplete)


def test_pins(unet):
    model, data = unet
    solver = PrecisionSolver.from_model(model, bits=(6, 4), pin={"first": 8, "last": 8, "*.time_emb_proj": {"w": 7}})
    ops = {op.name: op for op in solver.ops}
    assert ops["conv_in"].pinned == {"w": 8, "a": 8} == ops["conv_out"].pinned
    assert ops["mid_block.resnets.0.time_emb_proj"].pinned == {"w": 7} and ops["conv_in"].genes == ("w", "a")
    solver.calibrate(data, weight_iters=2, act_iters=2, batch_size=4)
    solver.set_uniform(4)
    assert solver.current is not None and solver.current["conv_in"] == {"w": 8, "a": 8}
    assert solver.current["mid_block.resnets.0.time_emb_proj"] == {"w": 7, "a": 4}
    assert list(solver.layers["conv_in"].dense) == [8]
    with pytest.raises(InputError, match="w bits of conv_in: found 4, expected 8, where they are pinned"):
        solver.set_bits({"conv_in": {"w": 4}})
    for pin, message in (({"nowhere": 8}, "pin nowhere"), ({"conv_in": {"q": 8}}, "gene q"), ({"conv_in": 1}, "bits")):
        with pytest.raises(InputError, match=message):
            PrecisionSolver.from_model(model, pin=pin)


def test_softmax(unet):
    model, data = unet
    exact = run(model, data)
    searched = PrecisionSolver.from_model(model, bits=(8, 4), softmax_bits="search")
    assert {op.genes for op in searched.ops} == {("w", "a"), ("q", "k", "v", "p")}
    searched.calibrate(data, method="minmax", batch_size=4)
    step = next(iter(searched.attentions.values())).steps["p"][8]
    assert not step.symmetric and float(step.zero) == 0
    outputs = []
    for bits in (8, 4):
        searched.set_bits({name: {"p": bits} for name in searched.attentions})
        outputs.append(run(searched.network, data))
    assert not torch.equal(*outputs)
    fused = PrecisionSolver.from_model(model, bits=(8, 4), softmax_bits=None)
    fused.calibrate(data, method="minmax", batch_size=4)
    assert "p" not in next(iter(fused.attentions.values())).genes
    assert float((run(fused.network, data) - exact).square().mean()) < 0.1 * float(exact.square().mean())


def test_splitting_can_be_left_out(unet):
    model, _ = unet
    assert len(PrecisionSolver.from_model(model).splits) == 4
    assert not PrecisionSolver.from_model(model, split_shortcuts=False).splits


class Shared(nn.Module):
    """One layer that is called twice, with inputs of two shapes, one that is never called; no diffusers model."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.idle = nn.Linear(3, 3)
        self.dropout = nn.Dropout(0.5)
        self.alias = self.conv

    def forward(self, x, t):
        small = self.alias(nn.functional.avg_pool2d(x, 2) * 20)
        return self.conv(self.dropout(x)) + nn.functional.interpolate(small, scale_factor=2) + t[:, None, None, None]


def test_shared_and_idle_layers():
    torch.manual_seed(0)
    model = Shared()
    x, t = torch.randn(6, 2, 8, 8), torch.arange(6)
    with pytest.raises(InputError, match="model: found Shared"):
        PrecisionSolver.from_model(model)
    with pytest.warns(UserWarning, match="never called have no genes: idle"):
        solver = PrecisionSolver.from_model(model, bits=(8, 4), example=(x, t))
    assert solver.unused == ("idle",) and [op.name for op in solver.ops] == ["conv"]
    assert solver.network.alias is solver.network.conv
    solver.network.train()
    solver.calibrate(CalibrationSet(x, t), weight_iters=3, act_iters=0, batch_size=3)
    assert solver.network.training  # what was found is restored
    pooled = nn.functional.avg_pool2d(x, 2) * 20
    largest = torch.cat([x.reshape(-1), pooled.reshape(-1)])
    delta, _ = tensor_parameters(largest, 8, symmetric=True)
    assert float(solver.layers["conv"].step_halves(8)[0].delta) == pytest.approx(float(delta))


def test_models_that_cannot_be_calibrated(unet):
    model, _ = unet
    with torch.device("meta"):
        meta = tiny_unet()
    other = tiny_unet()
    other.mid_block.attentions[0].set_processor(AttnAddedKVProcessor())
    for broken, message in (
        (meta, "meta device"),
        (copy.deepcopy(model).half(), r"float16 on the CPU, expected float32 \(call model\.float\(\)\)"),
        (torch.compile(model, backend="eager"), "a compiled module"),
        (other, "attention processor of mid_block.attentions.0"),
    ):
        with pytest.raises(InputError, match=message):
            PrecisionSolver.from_model(broken)


def test_options_are_checked(unet):
    model, data = unet
    for options, message in (
        ({"bits": (8, 8)}, "bits"),
        ({"bits": ()}, "bits"),
        ({"softmax_bits": 1}, "bits"),
    ):
        with pytest.raises(InputError, match=message):
            PrecisionSolver.from_model(model, **options)
    with pytest.warns(UserWarning, match=r"bits \[4, 8\] sorted to \[8, 4\]"):
        solver = PrecisionSolver.from_model(model, bits=(4, 8))
    with pytest.raises(InputError, match="not calibrated"):
        solver.set_uniform(8)
    for options, message in (
        ({"method": "best"}, "method"),
        ({"prefix": "none"}, "prefix"),
        ({"act_range": "x"}, "act_range"),
        ({"weight_iters": -1}, "weight_iters"),
        ({"batch_size": 100}, "found 12 samples, expected at least a batch of 100"),
    ):
        with pytest.raises(InputError, match=message):
            solver.calibrate(data, **options)
    wide = CalibrationSet(data.x.repeat(1, 2, 1, 1), data.t)
    with pytest.raises(InputError, match="found 2 channels, expected 1 of the model"):
        solver.calibrate(wide)


@pytest.mark.parametrize("prefix", ["same", "mixed"])
def test_learning_goes_on_after_a_stop(unet, tmp_path, prefix):
    model, data = unet
    options = {"weight_iters": 8, "act_iters": 3, "batch_size": 12, "prefix": prefix, "seed": 3}

    def solver() -> PrecisionSolver:
        return PrecisionSolver.from_model(model, bits=(4, 3))

    plain, whole = solver(), solver()
    plain.calibrate(data, method="minmax", batch_size=12)
    whole.calibrate(data, **options)
    plain.set_uniform(3)
    whole.set_uniform(3)
    assert not torch.equal(run(plain.network, data), run(whole.network, data))
    stopped = solver()
    seen = []

    def stop(text: str) -> None:
        seen.append(text)
        if len(seen) == 25:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped.calibrate(data, **options, progress=stop, resume=tmp_path)
    files = len(list(tmp_path.iterdir()))
    again = solver()
    again.calibrate(data, **options, resume=tmp_path)
    assert len(list(tmp_path.iterdir())) > files
    for bits in (4, 3):
        whole.set_uniform(bits)
        again.set_uniform(bits)
        assert torch.equal(run(whole.network, data), run(again.network, data))


def test_learning_lowers_the_error(unet):
    """Of the blocks' outputs, at few bits, on the data that were learned from."""
    model, data = unet
    solver, errors = PrecisionSolver.from_model(model, bits=(3,)), []
    for iterations in (0, 40):
        solver.calibrate(data, weight_iters=iterations, act_iters=0, batch_size=12, rounding_rate=3e-2)
        found = solver.errors(data, solver.uniform(3))
        errors.append(sum(found.values()) / len(found))
    assert errors[1] < 0.95 * errors[0]


def test_uniform_settings_do_not_depend_on_the_menu(unet):
    """Every uniform setting is an ordinary calibration at those bits."""
    model, data = unet
    outputs = []
    for menu in ((8, 4), (4,)):
        solver = PrecisionSolver.from_model(model, bits=menu)
        solver.calibrate(data, weight_iters=5, act_iters=5, batch_size=12)
        solver.set_uniform(4)
        outputs.append(run(solver.network, data))
    assert torch.equal(*outputs)


def test_dit_conditioning_outside_of_its_block():
    """The first block's embedding is also called by the network itself; both streams must keep their own bits."""
    model = tiny_dit().eval()
    data = inputs_for("dit", model)
    solver = PrecisionSolver.from_model(model, bits=(8, 3))
    (unit,) = (unit for unit in solver.units if unit.outside)
    assert unit.name == "transformer_blocks.0"
    solver.calibrate(data, weight_iters=2, act_iters=2, batch_size=4)
    errors = solver.errors(data, solver.uniform(8), batch_size=4)
    assert set(errors) == {unit.name for unit in solver.units} and max(errors.values()) < 0.01
    worse = solver.errors(data, solver.uniform(3), batch_size=4)
    assert all(worse[name] > errors[name] for name in errors)


def test_switching_does_not_compile_again(unet):
    model, data = unet
    solver = PrecisionSolver.from_model(model, bits=BITS)
    solver.calibrate(data, method="minmax", batch_size=4)
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    expected = []
    for seed in range(3):
        solver.set_bits(random_mixture(solver, seed))
        expected.append(run(solver.network, data))
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(solver.network, backend=backend)
        for seed in range(3):
            solver.set_bits(random_mixture(solver, seed))
            torch.testing.assert_close(run(compiled, data), expected[seed], rtol=1e-4, atol=1e-5)
            if not seed:
                first = len(graphs)
    assert len(graphs) == first
    torch._dynamo.reset()
