"""Noise levels, what the model predicts at each, and how much each weighs in the loss.

Letters: B batch. Latents and noise are (B, ...); a level u in [0, 1] falls evenly over the steps of
a sampler, so that 1 - u is the share of the denoising steps that lie behind it.
"""

import math
from dataclasses import dataclass

import torch
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
)
from torch import Tensor
from video_training.settings import Noise

# redraws before a range of levels counts as one that is never drawn
MAX_DRAWS = 1000


@dataclass(frozen=True)
class Target:
    """What a model gets, and what it is to answer.

    Args:
        noisy: latents with noise.
        timestep: (B,) as the scheduler counts them.
        wanted: the right answer.
        weight: (B,) of the squared error.
    """

    noisy: Tensor
    timestep: Tensor
    wanted: Tensor
    weight: Tensor


class Process:
    """How latents turn to noise, by what the scheduler of a model says.

    Args:
        scheduler: of the pipeline.

    Raises:
        ValueError: a weighting that belongs to another kind of model, or a prediction unknown.
    """

    def __init__(self, scheduler: object, noise: Noise):
        config = scheduler.config
        self.noise, self.total = noise, config.num_train_timesteps
        self.is_flow = "FlowMatch" in type(scheduler).__name__ or bool(
            config.get("use_flow_sigmas")
        )
        self.prediction = "flow" if self.is_flow else config.get("prediction_type", "epsilon")
        if not self.is_flow and self.prediction not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"the scheduler {type(scheduler).__name__} predicts '{self.prediction}', which is "
                "not trained: flow, epsilon and v_prediction are"
            )
        wrong = ("min_snr",) if self.is_flow else ("sigma_sqrt", "cosmap")
        if noise.weighting in wrong:
            raise ValueError(
                f"noise.weighting '{noise.weighting}' does not fit a model that predicts "
                f"'{self.prediction}'"
            )
        # where time runs backwards, from noise at 0
        self.is_inverted = bool(config.get("invert_sigmas"))
        self.config = config
        self.alphas = None if self.is_flow else scheduler.alphas_cumprod.double()

    def shift(self, tokens: int) -> float:
        """How far levels are pushed towards noise for clips of so many tokens."""
        if not self.is_flow:
            return 1.0
        config = self.config
        if self.noise.shift is not None:
            return self.noise.shift
        if config.get("use_dynamic_shifting"):
            span = config["max_image_seq_len"] - config["base_image_seq_len"]
            slope = (config["max_shift"] - config["base_shift"]) / span
            mu = config["base_shift"] + slope * (tokens - config["base_image_seq_len"])
            return math.exp(mu)
        return float(config.get("flow_shift") or config.get("shift") or 1.0)

    def sigma(self, u: Tensor | float, shift: float) -> Tensor | float:
        """Share of noise at a level."""
        return shift * u / (1 + (shift - 1) * u)

    def level(self, sigma: float, shift: float) -> float:
        """Level at a share of noise."""
        return sigma / (shift - (shift - 1) * sigma)

    def draw(
        self, count: int, generator: torch.Generator, span: tuple[float, float] = (0.0, 1.0)
    ) -> Tensor:
        """Levels (count,) as `noise.density` draws them, those that fall into a range.

        Raises:
            ValueError: the density never falls there.
        """
        noise, low, high = self.noise, *span
        found = torch.empty(0)
        for _ in range(MAX_DRAWS):
            u = compute_density_for_timestep_sampling(
                noise.density,
                64 + count,
                logit_mean=noise.logit_mean,
                logit_std=noise.logit_std,
                mode_scale=noise.mode_scale,
                generator=generator,
            )
            inside = (u >= low) & ((u < high) if high < 1 else (u <= 1))
            found = torch.cat([found, u[inside]])
            if len(found) >= count:
                return found[:count]
        raise ValueError(
            f"noise.density '{noise.density}' with logit_mean {noise.logit_mean} and logit_std "
            f"{noise.logit_std} never draws a level from {low:.3f} to {high:.3f}, which an expert "
            "or a part of the schedule has to itself"
        )

    def target(self, latents: Tensor, noise: Tensor, u: Tensor, shift: float) -> Target:
        """What the model gets at levels (B,), and what it is to answer."""
        shape = (-1, *[1] * (latents.ndim - 1))
        if self.is_flow:
            sigma = self.sigma(u, shift).clamp(min=1e-3).float()
            level = sigma.view(shape)
            weight = compute_loss_weighting_for_sd3(self.noise.weighting, sigma)
            sign = -1.0 if self.is_inverted else 1.0
            timestep = (1 - sigma if self.is_inverted else sigma) * self.total
            noisy = (1 - level) * latents + level * noise
            return Target(noisy, timestep, sign * (noise - latents), weight)
        step = (u * self.total).long().clamp(0, self.total - 1)
        alpha = self.alphas.to(step.device)[step]
        signal, level = (x.sqrt().float().view(shape) for x in (alpha, 1 - alpha))
        noisy = signal * latents + level * noise
        is_v = self.prediction == "v_prediction"
        wanted = signal * noise - level * latents if is_v else noise
        weight = torch.ones_like(alpha)
        if self.noise.weighting == "min_snr":
            snr = alpha / (1 - alpha)
            weight = snr.clamp(max=self.noise.snr_gamma) / (snr + 1 if is_v else snr)
            # at zero terminal SNR the quotient for noise has the limit 1
            weight = torch.where(snr > 0, weight, torch.zeros_like(weight) if is_v else 1.0)
        return Target(noisy, step, wanted, weight.float())
