"""The causal sibling: the same transformer, tuned to go on with a video chunk by chunk.

A chunk reads itself and the clean chunks before it, as many as the window holds.

B batch, C latent channels, F latent frames in chunks of n, P tokens a frame, H heads, D head dim;
latents are (B, C, F, h, w) with P = h * w, and levels of noise are (B, F).
"""

import functools
import itertools
from collections.abc import Sequence

import torch
from diffusers.models.transformers.transformer_wan import WanAttention, WanRotaryPosEmbed
from t2v.flow import FlowModel, TrainingAttention, attend, sample_sigma
from t2v.precision import fast_products
from torch import Tensor

Tokens = tuple[Tensor, Tensor]


class ChunkAttention(TrainingAttention):
    """Self-attention of a clip beside its clean copy, or of one chunk to those made before it."""

    def __init__(self) -> None:
        super().__init__()
        # places in the video of the frames that run
        self.frames: Sequence[int] = ()
        # of a clip beside its copy: places of queries, with those of the keys that they read
        self.reads: list[tuple[slice, list[slice]]] = []
        # of one chunk: keys and values of the chunks before it, by layer
        self.past: dict[WanAttention, list[Tensor]] | None = None
        self.window, self.keep = 0, False

    # a compiler takes what surrounds it
    @torch.compiler.disable
    def over_video(self, attn: WanAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention (B, H, S, D) of a layer."""
        pair = torch.stack([key, value])
        if self.past is None:
            parts = [
                attend(query[:, :, rows], *torch.cat([pair[:, :, :, x] for x in places], 3))
                for rows, places in self.reads
            ]
            return torch.cat(parts, 2)
        past = self.past.setdefault(attn, [])
        out = attend(query, *torch.cat([*past[-self.window :], pair], 3))
        if self.keep:
            past.append(pair)
        return out


def reads_of(num_chunks: int, size: int, window: int) -> list[tuple[slice, list[slice]]]:
    """Who reads whom where a clip of chunks of `size` tokens follows its clean copy.

    A chunk reads at most `window` chunks before it, of the copy, and itself.
    """
    clean = [slice(i * size, (i + 1) * size) for i in range(num_chunks)]
    noisy = [slice(x.start + num_chunks * size, x.stop + num_chunks * size) for x in clean]
    before = [clean[max(0, i - window) : i] for i in range(num_chunks)]
    return [
        (own, [*past, own])
        for copy in (clean, noisy)
        for own, past in zip(copy, before, strict=True)
    ]


def _tables(rope: WanRotaryPosEmbed, attention: ChunkAttention, latents: Tensor) -> tuple:
    """Rotation tables (1, S, 1, D) of the frames that run, wherever in the video they are."""
    last = max(attention.frames) + 1
    whole = type(rope).forward(rope, latents[:, :, :1].expand(-1, -1, last, -1, -1))
    return tuple(x.unflatten(1, (last, -1))[:, attention.frames].flatten(1, 2) for x in whole)


class CausalModel(FlowModel):
    """The transformer with its text encoder, which stays as it is."""

    attention_type = ChunkAttention

    def use_training_attention(self) -> "CausalModel":
        """Switch to attention by chunks, merged padding and float32 rotation tables."""
        super().use_training_attention()
        self.text_encoder.requires_grad_(False)
        rope = self.transformer.rope
        rope.forward = functools.partial(_tables, rope, self.attention)
        return self

    def forward(
        self, past: Tensor, noisy: Tensor, sigma: Tensor, tokens: Tokens, chunk: int, window: int
    ) -> Tensor:
        """Velocity (B, C, F, h, w) of all chunks at once, each after the clean ones of `past`."""
        frames, area = past.shape[2], past.shape[3] * past.shape[4]
        attention = self.attention
        attention.frames = [*range(frames)] * 2
        attention.reads = reads_of(frames // chunk, chunk * area, window)
        levels = torch.cat([torch.zeros_like(sigma), sigma], 1).repeat_interleave(area, 1)
        both = torch.cat([past, noisy], 2)
        embeddings = self.encode_text(*tokens)
        out = self.transformer(both, levels * 1000, embeddings, return_dict=False)[0]
        return out[:, :, frames:]

    @torch.no_grad()
    def roll_out(
        self,
        first: Tensor,
        tokens: Tokens,
        num_chunks: int,
        sigmas: Sequence[float],
        window: int,
        generator: torch.Generator,
    ) -> Tensor:
        """Go on from a clean chunk (B, C, n, h, w), each chunk in one step per level of noise."""
        embeddings, chunks, size = self.encode_text(*tokens), [first], first.shape[2]
        attention = self.attention
        attention.past, attention.window = {}, window

        def velocity(x: Tensor, level: float) -> Tensor:
            attention.keep = level == 0
            time = torch.full((len(x),), level * 1000)
            return self.transformer(x, time, embeddings, return_dict=False)[0]

        for number in range(num_chunks):
            attention.frames = [*range(number * size, (number + 1) * size)]
            if number > 0:
                x = torch.randn(first.shape, generator=generator)
                for now, later in itertools.pairwise([*sigmas, 0.0]):
                    x = x + (later - now) * velocity(x, now).float()
                chunks.append(x)
            if number + 1 < num_chunks:
                velocity(chunks[-1], 0.0)
        attention.past = None
        return torch.cat(chunks, 2)


def even_steps(count: int) -> list[float]:
    """Shares of noise at which a chunk's steps begin, before they are shifted."""
    return [1 - i / count for i in range(count)]


def steps_of(count: int, shift: float) -> list[float]:
    """Levels of noise at which a chunk's steps begin."""
    return [shift * u / (1 + (shift - 1) * u) for u in even_steps(count)]


def noised(latents: Tensor, chunk: int, shift: float, generator: torch.Generator):
    """Clips with noise of one level for each chunk: (noisy, levels (B, F), velocity)."""
    shape = len(latents), latents.shape[2] // chunk
    sigma = sample_sigma(shape[0] * shape[1], shift, generator).view(shape)
    sigma = sigma.repeat_interleave(chunk, 1)
    noise, level = torch.randn(latents.shape, generator=generator), sigma[:, None, :, None, None]
    return (1 - level) * latents + level * noise, sigma, noise - latents


def forcing_loss(
    model: CausalModel, latents: Tensor, tokens: Tokens, options: dict, seed: int
) -> Tensor:
    """Mean squared velocity error of every chunk after the real ones, which bear a little noise."""
    generator = torch.Generator().manual_seed(seed)
    noisy, sigma, velocity = noised(latents, options["chunk"], options["shift"], generator)
    spoiled = options["past_noise"] * torch.rand(len(latents), 1, 1, 1, 1, generator=generator)
    past = latents + spoiled * torch.randn(latents.shape, generator=generator)
    window = _window(options["windows"], generator)
    with fast_products():
        found = model(past, noisy, sigma, tokens, options["chunk"], window)
    return (found.float() - velocity).square().mean()


def rollout_loss(
    model: CausalModel,
    teacher: CausalModel,
    latents: Tensor,
    tokens: tuple[Tokens, Tokens],
    options: dict,
    seed: int,
) -> Tensor:
    """Mean squared distance from the teacher's guided velocity, which it finds after real chunks.

    The model finds its own after chunks it made itself from the first one: it learns to do without
    guidance, and to get back from where its errors lead. `tokens` are the captions' and of none.
    """
    generator = torch.Generator().manual_seed(seed)
    chunk, window = options["chunk"], _window(options["windows"], generator)
    noisy, sigma, _ = noised(latents, chunk, options["shift"], generator)
    count, steps = latents.shape[2] // chunk, steps_of(options["steps"], options["shift"])
    with fast_products():
        past = model.roll_out(latents[:, :, :chunk], tokens[0], count, steps, window, generator)
        with torch.no_grad():
            asked, free = (teacher(latents, noisy, sigma, x, chunk, window).float() for x in tokens)
        found = model(past, noisy, sigma, tokens[0], chunk, window)
    target = free + options["guidance"] * (asked - free)
    return (found.float() - target).square().mean()


def _window(windows: Sequence[int], generator: torch.Generator) -> int:
    return windows[int(torch.randint(len(windows), (1,), generator=generator))]
