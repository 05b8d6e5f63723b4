"""Where a word of the prompt is looked at in a video: a heat map over frames.

Source: Tang et al., "What the DAAM: Interpreting Stable Diffusion Using Cross Attention",
arXiv:2210.04885, sums the cross-attention to a word over heads, layers and steps. Much of it goes
to tokens without a meaning, padding and the end of the prompt, which draw attention as magnets do
(Kukleva et al., "RefAM: Attention Magnets for Zero-Shot Referral Segmentation", arXiv:2509.22650):
they are left out, so that the words of the prompt share what remains.

Letters: B batch, H heads, S queries, L text tokens, D head dim, W words of the prompt in tokens.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor, nn

from vidattn.grid import Size
from vidattn.kernels.engines.exact import only_pytorch
from vidattn.pipelines.family import family_of
from vidattn.pipelines.hooks.dual_path import WITHOUT_PROMPT
from vidattn.pipelines.hooks.intercept import Layer, give_back, take
from vidattn.pipelines.models import find_transformers

CROSS = re.compile(r"blocks\.\d+\.attn2")


class Looked:
    """What was seen of a word while a pipeline ran.

    Args:
        words: places of the prompt's tokens among the text tokens.
        mine: for each of them, whether it belongs to the word.
    """

    def __init__(self, words: Tensor, mine: Tensor):
        self._words, self._mine = words, mine
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, q: Tensor, k: Tensor, scale: float, size: Size) -> None:
        """Count a call of a layer: q (B, H, S, D) of the video, k (B, H, L, D) of the text."""
        keys = k[:, :, self._words.to(k.device)]
        weights = (scale * q @ keys.mT).float().softmax(-1)
        share = weights[..., self._mine.to(k.device)].sum(-1).mean(1)
        share = share.unflatten(1, size).cpu()
        if self._sum is not None and self._sum.shape != share.shape:
            raise RuntimeError(
                f"the videos of one look must be of one size, got {tuple(self._sum.shape)} and "
                f"{tuple(share.shape)} tokens: look at each on its own"
            )
        self._sum = share if self._sum is None else self._sum + share
        self._count += 1

    def heat(self) -> Tensor:
        """(B, t, h, w) float32 mean share of the attention to the prompt that the word takes.

        Raises:
            RuntimeError: nothing has run.
        """
        if self._sum is None:
            raise RuntimeError("no pass with the prompt has run yet: call the pipeline first")
        return self._sum / self._count


@contextmanager
def looking_at(pipe: Any, prompt: str, word: str) -> Iterator[Looked]:
    """Watch what a video's tokens read of a word of its prompt in a with block.

    What the pipeline computes does not change. It may be patched; guidance without the prompt is
    not counted.

    Args:
        pipe: a text-to-video pipeline of Wan, such as the bundled one.
        prompt: what it is called with, once or several times at one size.
        word: a word of the prompt, or several in a row; every place where it stands counts.

    Raises:
        ValueError: another pipeline, or a prompt without the word.

    >>> with looking_at(pipe, "a fox moving right", "fox") as looked:
    ...     video = pipe("a fox moving right").frames
    >>> looked.heat().shape
    torch.Size([1, 9, 16, 16])
    """
    models = _models_of(pipe)
    looked = Looked(*places_of(pipe.tokenizer, prompt, word))
    undo: list[Callable[[], None]] = []
    try:
        for model in models:
            undo += _install(model, looked)
        yield looked
    finally:
        for step in reversed(undo):
            step()


def places_of(tokenizer: Any, prompt: str, word: str) -> tuple[Tensor, Tensor]:
    """(W,) int64 places of the prompt's tokens, and (W,) bool, whether they are the word's.

    Raises:
        ValueError: the prompt does not have the word.
    """
    text = prompt_clean(prompt)
    given = tokenizer(text, return_offsets_mapping=True, add_special_tokens=True)
    spans = given["offset_mapping"]
    wanted = r"(?<!\w)" + re.escape(prompt_clean(word)) + r"(?!\w)"
    found = [x.span() for x in re.finditer(wanted, text, re.IGNORECASE)] if word.strip() else []
    words = [place for place, (start, end) in enumerate(spans) if end > start]
    mine = [any(spans[i][0] < end and start < spans[i][1] for start, end in found) for i in words]
    if not any(mine):
        raise ValueError(f"the prompt has no word {word!r}: it is {text!r}")
    return torch.tensor(words), torch.tensor(mine)


def _models_of(pipe: Any) -> list[nn.Module]:
    models = list(find_transformers(pipe).values())
    for model in models:
        layers = [x for path, x in model.named_modules() if CROSS.fullmatch(path)]
        has_picture = any(getattr(x, "add_k_proj", None) is not None for x in layers)
        if not layers or has_picture or not hasattr(pipe, "tokenizer"):
            raise ValueError(
                "words are looked at in the cross-attention of Wan's text-to-video pipelines, "
                f"got {type(pipe).__name__} with {type(model).__name__}"
            )
    return models


class _Tap:
    """Stands between the cross-attention of a transformer and what computes it."""

    def __init__(self, looked: Looked):
        self._looked = looked
        self.size: Size | None = None
        self.is_prompt = True

    def attend(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor, mask, scale, ring=None):
        """(B, H, S, D), as it would be."""
        if self.is_prompt and self.size is not None:
            factor = q.shape[-1] ** -0.5 if scale is None else scale
            with torch.no_grad():
                self._looked.add(q.detach(), k.detach(), factor, self.size)
        with only_pytorch():
            return layer.dense(q, k, v, mask, scale)[0]

    def skipped(self, layer: Layer, allowed: bool) -> None:
        """A layer ran without attending: nothing is seen there."""

    def cannot(self, layer: Layer, why: str) -> None:
        """A call is not to be caught: nothing is seen there."""

    def check_gradient(self, layer: Layer) -> None:
        """Gradients are those of what runs."""


def _install(model: Any, looked: Looked) -> list[Callable[[], None]]:
    """Stand before the cross-attentions of a transformer; what undoes it."""
    tap, family = _Tap(looked), family_of(model)
    taken = [(path, x.processor) for path, x in model.named_modules() if CROSS.fullmatch(path)]
    if len({id(processor) for _, processor in taken}) < len(taken):
        raise ValueError("several layers share one attention processor: give each its own")
    undo: list[Callable[[], None]] = []
    for index, (path, processor) in enumerate(taken):
        layer = Layer(path, index, tap, model)
        take(processor, layer)
        undo.append(functools.partial(give_back, processor, layer))

    def before(module: nn.Module, args: tuple, given: dict) -> None:
        latents = given[family.latents] if family.latents in given else args[0]
        tap.size = family.place(module, {"hidden_states": latents}).size

    undo.append(model.register_forward_pre_hook(before, with_kwargs=True).remove)
    inner, own = model.cache_context, model.__dict__.get("cache_context")

    @contextmanager
    def context(name: str, **steps: object) -> Iterator[None]:
        tap.is_prompt = name != WITHOUT_PROMPT
        try:
            with inner(name, **steps):
                yield
        finally:
            tap.is_prompt = True

    def forget() -> None:
        model.__dict__.pop("cache_context", None)
        if own is not None:
            model.cache_context = own

    model.cache_context = context
    return [*undo, forget]
