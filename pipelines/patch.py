"""Makes the self-attention of a diffusers video model sparse, in place and reversibly."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from torch import nn

from vidattn.method import Method
from vidattn.methods import create_method, label
from vidattn.pipelines.family import family_of, find_family, known_models
from vidattn.pipelines.generation import Generation
from vidattn.pipelines.report import LayerReport, Report
from vidattn.pipelines.root import RootHook
from vidattn.pipelines.settings import Settings
from vidattn.pipelines.site import Site
from vidattn.pipelines.steps import StepCounter
from vidattn.pipelines.stopwatch import Stopwatch
from vidattn.schedule import DenseGuard, Rule, Schedule
from vidattn.schedule_file import load_schedule


def patch(
    pipe_or_transformer: object,
    method: str | Method | None = None,
    *,
    schedule: str | Path | Schedule | None = None,
    dense_layers: int | float | None = None,
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
        schedule: instead of a method, which of them serves which layers, heads and steps: a YAML
            file, the name of one of the presets for published models (``vidattn list --presets``),
            or a Schedule.
        dense_layers: first layers of each transformer that stay dense: a count or a fraction; when
            not given 1, or what the schedule says.
        dense_steps: first denoising steps that stay dense: a count, or a fraction of the steps of
            the pipeline; when not given 0.1 for a pipeline and 0 for a transformer, or what the
            schedule says. The steps of a transformer alone are counted by its time steps.
        strict: raise when a layer that should be sparse cannot be; otherwise it runs dense and the
            report says why.
        options: fields of the method.

    Raises:
        ValueError: the model is unknown or cannot be patched, it is patched already, a bad method,
            option or guard, or a schedule that is broken or for another model.

    >>> with vidattn.patch(pipe, "radial", density=0.25) as handle:
    ...     video = pipe(prompt).frames
    >>> print(handle.report())
    """
    pipe = None if isinstance(pipe_or_transformer, nn.Module) else pipe_or_transformer
    steps = StepCounter(getattr(pipe, "scheduler", None))
    usual = DenseGuard(1, 0.1 if steps.knows_num_steps else 0)
    chosen = _schedule(method, schedule, options, usual).with_guard(dense_layers, dense_steps)
    transformers = _unpatched_transformers(pipe_or_transformer)
    if chosen.needs_num_steps and not steps.knows_num_steps:
        raise ValueError(
            f"{chosen.name} with dense_steps={chosen.guard.steps} names fractions of the denoising "
            f"steps, and {type(pipe_or_transformer).__name__} does not say how many there are: "
            "give a count, or patch the pipeline"
        )
    return Handle(pipe, transformers, Settings(chosen, strict, steps))


def _schedule(
    method: str | Method | None,
    schedule: str | Path | Schedule | None,
    options: dict[str, object],
    guard: DenseGuard,
) -> Schedule:
    """The schedule that is asked for, a method being one that serves everything."""
    if (method is None) == (schedule is None):
        raise ValueError(
            f"patch takes a method or a schedule, got method={method!r} and schedule={schedule!r}"
        )
    if options and not isinstance(method, str):
        raise ValueError(
            f"the options {sorted(options)} belong to a method given by name: set them in the "
            "method, or in the schedule"
        )
    if isinstance(schedule, Schedule):
        return schedule
    if schedule is not None:
        return load_schedule(schedule)
    method = create_method(method, **options) if isinstance(method, str) else method
    return Schedule((Rule(method),), guard, name=label(method))


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
        self.sites: list[Site] = []
        self._is_on = True
        try:
            for name, model in transformers.items():
                self.sites.append(Site(name, model, settings, self))
            settings.schedule.check({site.name: site.shape for site in self.sites})
            if pipe is not None:
                self._generation = Generation(pipe, self._begin, self._finish)
        except BaseException:
            self.remove()
            raise

    @property
    def schedule(self) -> Schedule:
        """Which method serves what; a method alone is a schedule of one rule."""
        return self._settings.schedule

    def report(self) -> Report:
        """What happened in the latest generation, or since patching for a bare transformer."""
        times = {}
        transformer_ms = sum(site.watch.read_ms() for site in self.sites)
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
        grids = sorted({str(grid) for site in self.sites for grid in site.grids})
        return Report(
            method=self.schedule.name,
            dense_layers=self.schedule.guard.layers,
            dense_steps=self.schedule.guard.steps,
            grids=tuple(grids),
            num_steps=self._settings.steps.num_seen,
            num_passes=sum(site.num_passes for site in self.sites),
            layers=tuple(layer for site in self.sites for layer in _layer_reports(site)),
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
        for site in self.sites:
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
        for site in self.sites:
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
        for site in self.sites:
            site.check_finite()
            if site.num_passes:
                site.check_ran({i for i, tally in enumerate(site.tallies) if tally.num_calls})
        if self._settings.strict and not any(site.num_passes for site in self.sites):
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
            methods={
                "; ".join(part.label for part in parts): calls
                for parts, calls in tally.parts.items()
            },
            density=tally.density_sum / tally.num_sparse if tally.num_sparse else None,
            num_searches=site.plans.searches[layer.index].num,
            recall=site.plans.searches[layer.index].recall,
            attention_ms=tally.watch.read_ms(),
        )
        for layer, tally in zip(site.layers, site.tallies)
    ]
