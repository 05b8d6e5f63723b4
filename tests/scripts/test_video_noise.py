"""Noise levels and targets agree with the samplers that the models are run with."""

import math

import diffusers
import pytest
import torch
from diffusers.training_utils import compute_snr
from video_training import noise as noises

from tests.scripts import video_cases as cases

Noise, Process = cases.settings.Noise, noises.Process


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pair():
    return torch.randn(2, 2, 4, 3, 5, 6, generator=generator())


FLOW = diffusers.FlowMatchEulerDiscreteScheduler


@pytest.mark.parametrize("inverted", [False, True])
def test_the_flow_sampler_steps_along_the_target(inverted):
    scheduler = FLOW(shift=3.0, invert_sigmas=inverted)
    process = Process(scheduler, Noise())
    scheduler.set_timesteps(8)
    latents, noise = pair()
    for number, step in enumerate(scheduler.timesteps[:-1]):
        share = step / 1000
        sigma = 1 - share if inverted else share
        if not 0.01 < sigma < 0.99:
            continue
        u = torch.full((2,), process.level(sigma.item(), 3.0))
        target = process.target(latents, noise, u, 3.0)
        torch.testing.assert_close(target.timestep, step.expand(2), rtol=1e-4, atol=1e-2)
        after = scheduler.step(target.wanted, step, target.noisy, return_dict=False)[0]
        share = scheduler.timesteps[number + 1] / 1000
        sigma = 1 - share if inverted else share
        expected = (1 - sigma) * latents + sigma * noise
        torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_diffusion_sampler_finds_the_latents_from_the_target(prediction):
    scheduler = diffusers.CogVideoXDDIMScheduler(
        prediction_type=prediction, snr_shift_scale=1.0, rescale_betas_zero_snr=True
    )
    scheduler.set_timesteps(1000)
    process = Process(scheduler, Noise())
    latents, noise = pair()
    for u in (0.05, 0.3, 0.8):
        target = process.target(latents, noise, torch.full((2,), u), 1.0)
        step = int(u * 1000)
        assert target.timestep.tolist() == [step, step]
        noisy = scheduler.add_noise(latents, noise, target.timestep)
        torch.testing.assert_close(target.noisy, noisy, rtol=1e-4, atol=1e-4)
        _, found = scheduler.step(target.wanted, step, target.noisy, return_dict=False)
        torch.testing.assert_close(found, latents, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_as_in_its_paper(prediction):
    scheduler = diffusers.DDPMScheduler(prediction_type=prediction)
    process = Process(scheduler, Noise(weighting="min_snr", snr_gamma=5.0))
    latents, noise = pair()
    u = torch.tensor([0.02, 0.7])
    target = process.target(latents, noise, u, 1.0)
    snr = compute_snr(scheduler, target.timestep)
    divisor = snr + 1 if prediction == "v_prediction" else snr
    torch.testing.assert_close(target.weight, snr.clamp(max=5.0) / divisor, rtol=1e-3, atol=1e-5)
    plain = Process(scheduler, Noise()).target(latents, noise, u, 1.0)
    assert plain.weight.tolist() == [1, 1]


def test_flow_weights_are_those_of_diffusers():
    process = Process(FLOW(shift=1.0), Noise(weighting="cosmap"))
    target = process.target(*pair(), torch.tensor([0.25, 0.5]), 1.0)
    expected = [2 / (math.pi * (1 - 2 * s + 2 * s * s)) for s in (0.25, 0.5)]
    torch.testing.assert_close(target.weight, torch.tensor(expected))


@pytest.mark.parametrize(
    ("scheduler", "given", "tokens", "expected"),
    [
        (FLOW(shift=5.0), None, 9, 5.0),
        (FLOW(shift=5.0), 3.0, 9, 3.0),
        (diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=8.0), None, 9, 8.0),
        (FLOW(use_dynamic_shifting=True), None, 256, math.exp(0.5)),
        (FLOW(use_dynamic_shifting=True), None, 4096, math.exp(1.15)),
        (diffusers.DDPMScheduler(), 3.0, 9, 1.0),
    ],
)
def test_the_shift_is_that_of_the_model(scheduler, given, tokens, expected):
    process = Process(scheduler, Noise(shift=given))
    assert math.isclose(process.shift(tokens), expected, rel_tol=1e-6)


def test_dynamic_shifting_is_that_of_the_scheduler():
    scheduler = FLOW(use_dynamic_shifting=True)
    process = Process(scheduler, Noise())
    scheduler.set_timesteps(6, mu=0.8)
    u = torch.linspace(1, 1 / 6, 6)
    expected = scheduler.time_shift(0.8, 1.0, u)
    torch.testing.assert_close(process.sigma(u, math.exp(0.8)), expected)


def test_levels_and_shares_of_noise_are_inverse():
    process = Process(FLOW(), Noise())
    for shift in (1.0, 3.0, 5.0):
        for sigma in (0.0, 0.3, 0.875, 1.0):
            assert math.isclose(process.sigma(process.level(sigma, shift), shift), sigma)


@pytest.mark.parametrize("density", ["uniform", "logit_normal", "mode"])
def test_levels_fall_into_a_range_as_the_density_has_them_there(density):
    process = Process(FLOW(), Noise(density=density))
    every = process.draw(40000, generator())
    part = process.draw(20000, generator(1), (0.3, 0.6))
    assert part.min() >= 0.3 and part.max() < 0.6
    wanted = every[(every >= 0.3) & (every < 0.6)]
    assert abs(part.mean() - wanted.mean()) < 0.003 and abs(part.std() - wanted.std()) < 0.003


def test_a_range_that_is_never_drawn():
    process = Process(FLOW(), Noise(logit_mean=-9.0, logit_std=0.1))
    with pytest.raises(ValueError, match="never draws a level from 0.500 to 1.000"):
        process.draw(1, generator(), (0.5, 1.0))


@pytest.mark.parametrize(
    ("scheduler", "noise", "message"),
    [
        (diffusers.DDPMScheduler(prediction_type="sample"), {}, "predicts 'sample'"),
        (FLOW(), {"weighting": "min_snr"}, "'min_snr' does not fit a model that predicts 'flow'"),
        (diffusers.DDPMScheduler(), {"weighting": "cosmap"}, "'cosmap' does not fit"),
    ],
)
def test_what_does_not_fit_the_scheduler(scheduler, noise, message):
    with pytest.raises(ValueError, match=message):
        Process(scheduler, Noise(**noise))
