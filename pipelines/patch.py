"""Makes the self-attention of a diffusers video model sparse, in place and reversibly."""

from __future__ import annotations

from types import TracebackType

from torch import nn

from vidattn.method import Method
from vidattn.methods import create_method
from vidattn.pipelines.family import family_of, find_family, known_models
from vidattn.pipelines.generation import Generation
from vidattn.pipelines.report import LayerReport, Report
from vidattn.pipelines.root import RootHook
from vidattn.pipelines.settings import Settings
from vidattn.pipelines.site import Site
from vidattn.pipelines.steps import StepCounter
from vidattn.pipelines.stopwatch import Stopwatch
from vidattn.schedule import DenseGuard


def patch(
    pipe_or_transformer: object,
    method: str | Method,
    *,
    dense_layers: int | float = 1,
    dense_steps: int | float | None = None,
    strict: bool = True,
    **options: object,
) -> Handle:
    """Make the self-attention of a diffusers video pipeline or transformer sparse.

    The model is changed in place until ``unpatch``, ``handle.remove()`` or the end of a with block,
    after which its outputs are bit for bit what they were. Cross-attention is left alone, text in
    the sequence is always read, and the grid is found anew for every forward pass. A copy of a
    patched model is not patched.

    Args:
        pipe_or_transformer: a pipeline, all of whose video transformers are patched, or one of
            them alone.
        method: a name from ``list_methods()``, or a method with its options set.
        dense_layers: first layers of each transformer that stay dense: a count or a fraction.
        dense_steps: first denoising steps that stay dense: a count, or a fraction of the steps of
            the pipeline; 0.1 for a pipeline and 0 for a transformer when not given. The steps of a
            transformer alone are counted by its time steps.
        strict: raise when a layer that should be sparse cannot be; otherwise it runs dense and the
            report says why.
        options: fields of the method.

    Raises:
        ValueError: the model is unknown or cannot be patched, it is patched already, or a bad
            method, option or guard.

    >>> with vidattn.patch(pipe, "radial", density=0.25) as handle:
    ...     video = pipe(prompt).frames
    >>> print(handle.report())
    """
    method = _method(method, options)
    pipe = None if isinstance(pipe_or_transformer, nn.Module) else pipe_or_transformer
    steps = StepCounter(getattr(pipe, "scheduler", None))
    if dense_steps is None:
        dense_steps = 0.1 if steps.knows_num_steps else 0
    guard = DenseGuard(dense_layers, dense_steps)
    transformers = _unpatched_transformers(pipe_or_transformer)
    if guard.needs_num_steps and not steps.knows_num_steps:
        raise ValueError(
            f"dense_steps={dense_steps} is a fraction of the denoising steps, and "
            f"{type(pipe_or_transformer).__name__} does not say how many there are: give a count, "
            "or patch the pipeline"
        )
    return Handle(pipe, transformers, Settings(method, guard, strict, steps))


def _method(method: str | Method, options: dict[str, object]) -> Method:
    """The method with its options set."""
    if not isinstance(method, Method):
        return create_method(method, **options)
    if options:
        raise ValueError(
            f"the options {sorted(options)} were given beside a method that has its own: set them "
            "in the method, or give its name"
        )
    return method


def unpatch(pipe_or_transformer: object) -> None:
    """Undo ``patch``: the model computes bit for bit what it did before.

    A transformer that was patched with its pipeline takes the whole pipeline along.

    Raises:
        ValueError: nothing is patched there.
    """
    for model in _transformers(pipe_or_transformer).values():
        if (handle := find_handle(model)) is not None:
            handle.remove()
            return
    raise ValueError(f"this {type(pipe_or_transformer).__name__} is not patched")


class Handle:
    """A patched pipeline or transformer; leaving a with block unpatches it."""

    def __init__(self, pipe: object | None, transformers: dict[str, nn.Module], settings: Settings):
        self._pipe, self._settings = pipe, settings
        self._generation: Generation | None = None
        self._sites: list[Site] = []
        self._is_on = True
        try:
            for name, model in transformers.items():
                self._sites.append(Site(name, model, settings, self))
            if pipe is not None:
                self._generation = Generation(pipe, self._begin, self._finish)
        except BaseException:
            self.remove()
            raise

    @property
    def method(self) -> Method:
        """The method, with its options."""
        return self._settings.method

    def report(self) -> Report:
        """What happened in the latest generation, or since patching for a bare transformer."""
        times = {}
        transformer_ms = sum(site.watch.read_ms() for site in self._sites)
        if self._generation is not None:
            total = self._generation.total_ms
            vae = self._generation.vae.read_ms()
            text_encoder = self._generation.text_encoder.read_ms()
            times = {
                "vae_ms": vae,
                "text_encoder_ms": text_encoder,
                "rest_ms": max(total - transformer_ms - vae - text_encoder, 0.0),
                "total_ms": total,
            }
        grids = sorted({str(grid) for site in self._sites for grid in site.grids})
        return Report(
            method=repr(self.method),
            grids=tuple(grids),
            num_steps=self._settings.steps.num_seen,
            num_passes=sum(site.num_passes for site in self._sites),
            layers=tuple(layer for site in self._sites for layer in _layer_reports(site)),
            transformer_ms=transformer_ms,
            plan_ms=self._settings.watch.read_ms(),
            **times,
        )

    def remove(self) -> None:
        """Unpatch; a second time does nothing."""
        if not self._is_on:
            return
        self._is_on = False
        if self._generation is not None:
            self._generation.remove()
        for site in self._sites:
            site.remove()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def _begin(self) -> None:
        for site in self._sites:
            if unwrap(getattr(self._pipe, site.name, None)) is not site.model:
                raise RuntimeError(
                    f"the {site.name} of this pipeline is not the one that was patched: unpatch, "
                    "then patch again"
                )
            site.reset()
            site.swap_processors()
        self._settings.steps.reset()
        self._settings.watch = Stopwatch()

    def _finish(self) -> None:
        for site in self._sites:
            site.check_finite()
            if site.num_passes:
                site.check_ran({i for i, tally in enumerate(site.tallies) if tally.num_calls})
        if self._settings.strict and not any(site.num_passes for site in self._sites):
            raise RuntimeError(
                "the pipeline ran without its patched transformer, so nothing was sparse: patch "
                "what it runs, or patch with strict=False"
            )


def find_handle(model: nn.Module) -> Handle | None:
    """The handle of a patched transformer, None for one that is not patched."""
    for hook in model._forward_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, RootHook) and owner.site is not None:
            return owner.site.handle
    return None


def unwrap(model: object) -> object:
    """The module inside what torch.compile returned; anything else as it is."""
    return getattr(model, "_orig_mod", model)


def _transformers(pipe_or_transformer: object) -> dict[str, nn.Module]:
    """The video transformers of a pipeline by their component names, or the one given.

    Raises:
        ValueError: there is none that can be patched.
    """
    if isinstance(pipe_or_transformer, nn.Module):
        model = unwrap(pipe_or_transformer)
        family_of(model)
        return {"transformer": model}
    components = getattr(pipe_or_transformer, "components", None)
    if components is None:
        raise ValueError(
            f"cannot patch a {type(pipe_or_transformer).__name__}: give a diffusers pipeline or a "
            f"video transformer. Known: {', '.join(known_models())}"
        )
    modules = {name: unwrap(part) for name, part in components.items()}
    modules = {name: part for name, part in modules.items() if isinstance(part, nn.Module)}
    found = {name: part for name, part in modules.items() if find_family(part) is not None}
    if not found:
        name = next((name for name in modules if name.startswith(("transformer", "unet"))), None)
        if name is not None:
            family_of(modules[name])
        raise ValueError(
            f"{type(pipe_or_transformer).__name__} has no video transformer that vidattn knows. "
            f"Known: {', '.join(known_models())}"
        )
    for part in found.values():
        family_of(part)
    # one transformer may stand under two names
    names = {id(part): name for name, part in reversed(found.items())}
    return {name: part for name, part in found.items() if names[id(part)] == name}


def _unpatched_transformers(pipe_or_transformer: object) -> dict[str, nn.Module]:
    transformers = _transformers(pipe_or_transformer)
    for name, model in transformers.items():
        if find_handle(model) is not None:
            raise ValueError(
                f"{name} ({type(model).__name__}) is patched already: call vidattn.unpatch first"
            )
    return transformers


def _layer_reports(site: Site) -> list[LayerReport]:
    return [
        LayerReport(
            name=f"{site.name}.{layer.name}",
            num_sparse=tally.num_sparse,
            num_dense=dict(tally.num_dense),
            density=tally.density_sum / tally.num_sparse if tally.num_sparse else None,
            attention_ms=tally.watch.read_ms(),
        )
        for layer, tally in zip(site.layers, site.tallies)
    ]
