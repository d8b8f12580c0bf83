"""One embedder for all blocks, and modulation computed before sampling."""

import copy
import json

import pytest
import qdit
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import TimestepEmbedding
from papercore.errors import InputError
from qdit.config import QDiTConfig
from qdit.original import set_frequency_shift
from qdit.pipeline import WEIGHTS
from safetensors.torch import load_file

PLAIN = QDiTConfig(wbits=4, abits=8, group_size=8, gptq=False)
STEPS = [0, 250, 999]


@pytest.fixture
def equal(model) -> DiTTransformer2DModel:
    """A model whose blocks have equal embedders, as imported ones do."""
    state = model.transformer_blocks[0].norm1.emb.state_dict()
    model.transformer_blocks[1].norm1.emb.load_state_dict(state)
    return model


def count_embeddings(model, inputs) -> int:
    calls = []
    hooks = [
        module.register_forward_hook(lambda *_: calls.append(1))
        for module in model.modules()
        if isinstance(module, TimestepEmbedding)
    ]
    inputs.run(model, inputs)
    for hook in hooks:
        hook.remove()
    return len(calls)


def test_sharing_keeps_the_bits_and_computes_once(equal, inputs):
    expected = inputs.run(equal, inputs)
    assert count_embeddings(equal, inputs) == 3  # two blocks and the output
    before = sum(p.numel() for p in equal.parameters())
    assert qdit.share_embedders(equal) is equal
    assert qdit.share_embedders(equal) is equal
    assert count_embeddings(equal, inputs) == 1
    assert torch.equal(inputs.run(equal, inputs), expected)
    assert before - sum(p.numel() for p in equal.parameters()) == 24 * (256 + 1 + 24 + 1 + 11)


def test_an_embedding_is_not_kept_from_one_forward_to_the_next(equal, inputs):
    plain = copy.deepcopy(equal)
    qdit.share_embedders(equal)
    t = inputs.t.clone()
    for step in (1, 500):
        t.fill_(step)
        one, other = (m(inputs.x, timestep=t, class_labels=inputs.y).sample for m in (plain, equal))
        assert torch.equal(one, other)

    def fail(*_: object) -> None:
        raise RuntimeError("in the middle of a forward")

    hook = equal.transformer_blocks[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        inputs.run(equal, inputs)
    hook.remove()
    embedder = equal.transformer_blocks[1].norm1.emb
    t.fill_(1)
    first = embedder(t, inputs.y, hidden_dtype=torch.float32)
    t.fill_(2)
    assert not torch.equal(embedder(t, inputs.y, hidden_dtype=torch.float32), first)


def test_a_copy_shares_its_own_embedder(equal, inputs):
    expected = inputs.run(qdit.share_embedders(equal), inputs)
    copied = copy.deepcopy(equal)
    with torch.no_grad():
        equal.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight.zero_()
    assert torch.equal(inputs.run(copied, inputs), expected)
    assert count_embeddings(copied, inputs) == 1


@pytest.mark.parametrize("changes", [None, {}, {"gptq": True, "act": "static", "adaln_bits": 4}])
def test_shared_models_are_stored_with_one_copy(equal, inputs, tmp_path, changes):
    set_frequency_shift(equal, 0)
    plain, model = copy.deepcopy(equal), qdit.share_embedders(equal)
    if changes is not None:
        setting = QDiTConfig(**{"wbits": 4, "abits": 8, "group_size": 8, "gptq": False, **changes})
        plain, model = (qdit.quantize(m, setting, inputs) for m in (plain, model))
    expected = inputs.run(plain, inputs)
    assert torch.equal(inputs.run(model, inputs), expected)
    qdit.save_pretrained(model, tmp_path)
    assert not any(name.startswith("transformer_blocks.1.norm1.emb") for name in load_file(tmp_path / WEIGHTS))
    again = qdit.load_pretrained(tmp_path)
    assert torch.equal(inputs.run(again, inputs), expected)
    assert count_embeddings(again, inputs) == 1


def test_embedders_that_differ_are_kept(model, inputs):
    expected = inputs.run(model, inputs)
    name = r"transformer_blocks\.1\.norm1\.emb\.timestep_embedder\.linear_1\.weight"
    with pytest.raises(InputError, match=name):
        qdit.share_embedders(model)
    assert torch.equal(inputs.run(model, inputs), expected)
    model.transformer_blocks[1].norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    model.transformer_blocks[1].norm1.emb.time_proj.downscale_freq_shift = 0
    with pytest.raises(InputError, match="frequency shift of block 1"):
        qdit.share_embedders(model)
    with pytest.raises(InputError, match="found Linear"):
        qdit.share_embedders(torch.nn.Linear(2, 2))


def test_a_damaged_flag_is_named(equal, tmp_path):
    qdit.save_pretrained(qdit.share_embedders(equal), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["shared_embedders"] is True
    for change, words in (
        ({"shared_embedders": "yes"}, "field shared_embedders: found 'yes'"),
        ({"timestep_frequency_shift": "none"}, "field timestep_frequency_shift: found 'none'"),
        ({"shared_embedders": False}, r"tensor transformer_blocks\.1\.norm1\.emb\..*: found nothing"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(InputError, match=words) as caught:
            qdit.load_pretrained(tmp_path)
        assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("changes", [None, {}, {"adaln_bits": 4}, {"wbits": 8, "w_sym": True, "adaln_bits": 8}])
def test_precomputed_modulation_gives_the_same_outputs(equal, inputs, changes, shared):
    if shared:
        qdit.share_embedders(equal)
    else:  # independent embedders
        torch.nn.init.normal_(equal.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight)
    model = equal
    if changes is not None:
        setting = QDiTConfig(**{"wbits": 4, "abits": 8, "group_size": 8, "gptq": False, **changes})
        model = qdit.quantize(equal, setting)
    expected = inputs.run(model, inputs)
    names = [name for name, _ in model.named_modules()]
    with qdit.precomputed_conditioning(model, inputs.t, inputs.y):
        for batch in inputs.batches(7):  # other batches than the table's
            part = inputs.run(model, batch)
            whole = expected[: len(part)]
            expected = expected[len(part) :]
            assert (part - whole).abs().max() <= 1e-6 * whole.abs().max()
        assert count_embeddings(model, inputs) == 0
    assert [name for name, _ in model.named_modules()] == names
    assert count_embeddings(model, inputs) == (1 if shared else 3)


def test_the_model_is_put_back_after_an_exception(model, inputs):
    expected = inputs.run(model, inputs)
    state = {name: id(module) for name, module in model.named_modules()}
    for timesteps, labels, words in (
        ([5], [0, 1], r"timestep \d+"),
        (range(1000), [3], r"label \d+: found no such table, expected one of \[3\]"),
    ):
        with (
            pytest.raises(InputError, match=words),
            qdit.precomputed_conditioning(model, list(timesteps), labels),
        ):
            inputs.run(model, inputs)
        assert {name: id(module) for name, module in model.named_modules()} == state
    assert torch.equal(inputs.run(model, inputs), expected)


def test_what_cannot_be_precomputed(model):
    for timesteps, labels, words in (
        ([], [0], "timesteps"),
        ([1.5], [0], "timesteps: found torch.float32"),
        ([-1], [0], "timesteps: found -1..-1, expected at least 0"),
        ([0], [11], r"labels: found 11..11, expected 0..10"),
    ):
        with pytest.raises(InputError, match=words), qdit.precomputed_conditioning(model, timesteps, labels):
            pass
    with qdit.precomputed_conditioning(model, [0], [0]):
        again = qdit.precomputed_conditioning(model, [0], [0])
        with pytest.raises(InputError, match="precomputed already"), again:
            pass
    with (
        pytest.raises(InputError, match="found Linear"),
        qdit.precomputed_conditioning(torch.nn.Linear(1, 1), [0], [0]),
    ):
        pass
    model.train()
    with pytest.raises(InputError, match="training mode"), qdit.precomputed_conditioning(model, [0], [0]):
        pass


@pytest.mark.parametrize("guidance", [None, 1.5])
def test_sampling_with_precomputed_modulation(model, guidance):
    z, labels = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([4, 4, 7])
    quantised = qdit.quantize(model, QDiTConfig(wbits=4, abits=16, group_size=8, gptq=False, adaln_bits=4))
    for m in (model, quantised):
        expected = qdit.sample(m, z, labels, 4, guidance=guidance)
        found = qdit.sample(m, z, labels, 4, guidance=guidance, precompute=True)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_precomputing_in_half_precision_keeps_the_type(model, inputs):
    half = copy.deepcopy(model).to(torch.bfloat16)
    x = inputs.x.bfloat16()
    with torch.no_grad():
        expected = half(x, timestep=inputs.t, class_labels=inputs.y).sample
        with qdit.precomputed_conditioning(half, inputs.t, inputs.y):
            found = half(x, timestep=inputs.t, class_labels=inputs.y).sample
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().max() <= 0.02 * expected.abs().max()
