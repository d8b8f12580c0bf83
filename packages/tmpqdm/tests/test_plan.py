"""Plans as files, and the schedulers that run them."""

import dataclasses
import json

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DPMSolverMultistepScheduler, UNet2DModel
from papercore.diffusion import ddim_sample, dpm_sample
from papercore.errors import InputError
from tmpqdm.plan import Plan, betas_hash, largest_bits
from tmpqdm.schedulers import NonUniformDDIMScheduler, dpm_scheduler

ALPHAS = DDIMScheduler(1000, beta_end=0.02, clip_sample=False).alphas_cumprod
LIST = (0, 9, 39, 88, 158, 246, 355, 483, 632, 800)


def plan(**changes) -> Plan:
    values = {
        "timesteps": LIST,
        "bits": {"conv_in": {"w": 8, "a": 6}},
        "model": {"class": "UNet2DModel", "hash": "abc", "parameters": 1},
        "schedule": {"T": 1000, "betas_hash": betas_hash(ALPHAS), "prediction_type": "epsilon"},
    }
    return Plan(**(values | changes))


def model(x, t):
    return 0.3 * x + 0.1 * torch.sin(x + t.view(-1, 1, 1, 1) / 500)


def run(scheduler, x, **options):
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t.expand(len(x))), t, x, **options).prev_sample
    return x


@pytest.mark.parametrize("final", [1.0, float(ALPHAS[0])])
def test_the_scheduler_is_the_sampler(final):
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    base = DDIMScheduler(1000, beta_end=0.02, clip_sample=False)
    scheduler = NonUniformDDIMScheduler.from_plan(plan(final_alpha=final), base)
    assert scheduler.timesteps.tolist() == list(reversed(LIST))
    expected = ddim_sample(model, x, LIST, ALPHAS.double(), final_alpha_cumprod=final)
    torch.testing.assert_close(run(scheduler, x), expected, rtol=0, atol=1e-6)
    noise = [torch.randn_like(x) for _ in LIST]
    y = x
    for i, t in enumerate(scheduler.timesteps):
        y = scheduler.step(model(y, t.expand(2)), t, y, eta=0.6, variance_noise=noise[i]).prev_sample
    expected = ddim_sample(model, x, LIST, ALPHAS.double(), eta=0.6, noise=noise, final_alpha_cumprod=final)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("options", [{"clip_sample": True}, {"thresholding": True}, {"clip_sample": False}], ids=str)
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_on_equal_spacing_it_is_diffusers_own(kind, options, eta):
    settings = {"beta_end": 0.02, "prediction_type": kind, "set_alpha_to_one": False} | options
    own, other = NonUniformDDIMScheduler(1000, **settings), DDIMScheduler(1000, **settings)
    other.set_timesteps(20)
    own.set_timesteps(timesteps=other.timesteps.tolist())
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    results = []
    for scheduler in (own, other):
        y, generator = x, torch.Generator().manual_seed(5)
        for t in scheduler.timesteps:
            y = scheduler.step(model(y, t.expand(2)), t, y, eta=eta, generator=generator).prev_sample
        results.append(y)
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


def test_in_a_pipeline():
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()
    pipe = DDIMPipeline(unet, DDIMScheduler(1000, beta_end=0.02, clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = NonUniformDDIMScheduler.from_plan(plan(), pipe.scheduler)
    images = pipe(batch_size=2, generator=torch.Generator().manual_seed(1), output_type="np").images
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = ddim_sample(lambda x, t: unet(x, t).sample, x, LIST, ALPHAS.double())
    torch.testing.assert_close(
        torch.from_numpy(images).permute(0, 3, 1, 2), (expected / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5
    )


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers
def test_the_second_order_scheduler_is_the_sampler():
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    base = DDIMScheduler(1000, beta_end=0.02, clip_sample=False)
    scheduler = dpm_scheduler(plan(sampler="dpmpp-2m"), base)
    assert isinstance(scheduler, DPMSolverMultistepScheduler)
    y = x
    for t in scheduler.timesteps:
        y = scheduler.step(model(y, t.expand(2)), t, y).prev_sample
    torch.testing.assert_close(y, dpm_sample(model, x, LIST, ALPHAS.double()), rtol=1e-3, atol=1e-3)
    with pytest.raises(InputError, match="sampler of the plan"):
        dpm_scheduler(plan(), base)
    with pytest.raises(InputError, match="sampler of the plan"):
        NonUniformDDIMScheduler.from_plan(plan(sampler="dpmpp-2m"), base)


def test_learned_variance_is_cut_off_and_other_shapes_refused():
    scheduler = NonUniformDDIMScheduler(1000)
    scheduler.set_timesteps(timesteps=[3, 500])
    x = torch.randn(1, 3, 4, 4)
    both = torch.randn(1, 6, 4, 4)
    one = scheduler.step(both[:, :3], 500, x).prev_sample
    assert torch.equal(scheduler.step(both, 500, x).prev_sample, one)
    with pytest.raises(InputError, match="model output"):
        scheduler.step(torch.randn(1, 4, 4, 4), 500, x)
    with pytest.raises(InputError, match=r"timestep: found 7, expected one of \[3, 500\]"):
        scheduler.step(x, 7, x)


@pytest.mark.parametrize(
    ("timesteps", "words"),
    [
        ([0, 9, 9], r"timesteps\[2\]: found 9"),
        ([0, 20, 9, 30], r"timesteps\[2\]: found 9"),
        ([-1, 5], r"timesteps\[0\]: found -1"),
        ([5, 1000], r"timesteps\[1\]: found 1000"),
        ([0.5, 3], r"timesteps\[0\]: found 0.5"),
        ([True, 3], r"timesteps\[0\]: found True"),
        ([], "empty"),
    ],
)
def test_lists_that_no_sampler_can_run(timesteps, words):
    with pytest.raises(InputError, match=words):
        NonUniformDDIMScheduler(1000).set_timesteps(timesteps=timesteps)
    with pytest.raises(InputError, match=words):
        plan(timesteps=tuple(timesteps))


def test_plans_come_back_from_their_files(tmp_path):
    steps = tuple({"timestep": t, "bits": {"conv_in": {"w": 8 - i % 3, "a": 6}}} for i, t in enumerate(LIST))
    for made in (plan(), plan(per_step_bits=steps, scores=({"metric": "frechet", "value": 1.5},), seed=3)):
        made.save(tmp_path / "plan.json")
        assert Plan.load(tmp_path / "plan.json") == made
    assert made.bits_at(9) == {"conv_in": {"w": 7, "a": 6}}
    assert largest_bits([step["bits"] for step in steps]) == {"conv_in": {"w": 8, "a": 6}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "other"}, "format"),
        ({"version": 2}, "version: found 2"),
        ({"timesteps": [5, 3]}, "timesteps"),
        ({"timesteps": None}, "plan|timesteps"),
        ({"bits": {"conv_in": {"w": 1}}}, "conv_in.w: found 1"),
        ({"bits": {"conv_in": {"z": 4}}}, "gene z"),
        ({"bits": [1]}, "bits: found list"),
        ({"sampler": "euler"}, "sampler"),
        ({"final_alpha": 0}, "final_alpha"),
        ({"schedule": {}}, "schedule.T"),
        ({"per_step_bits": [{"timestep": 0, "bits": {}}]}, "per_step_bits"),
        ({"colour": 1}, "field colour"),
    ],
)
def test_files_that_are_no_plan(tmp_path, change, words):
    path = tmp_path / "plan.json"
    plan().save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=words) as caught:
        Plan.load(path)
    assert str(path) in str(caught.value)


def test_a_plan_is_for_its_schedule_and_model():
    other = DDIMScheduler(1000, beta_end=0.015)
    with pytest.raises(InputError, match="noise schedule"):
        NonUniformDDIMScheduler.from_plan(plan(), other)
    NonUniformDDIMScheduler.from_plan(plan(), other, force=True)
    with pytest.raises(InputError, match="model"):
        plan().check_model("def")
    assert betas_hash(ALPHAS) == betas_hash(ALPHAS.double())
    assert dataclasses.replace(plan(), seed=1) != plan()
