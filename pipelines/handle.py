"""What ``patch`` hands back: the report of a patched model, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from vidattn.pipelines.generation import Generation
from vidattn.pipelines.hooks import riflex
from vidattn.pipelines.hooks.calls import Calls
from vidattn.pipelines.hooks.root import RootHook
from vidattn.pipelines.hooks.swap import marks
from vidattn.pipelines.learned import keys_of, read_state
from vidattn.pipelines.models import parts_of, transformers_of
from vidattn.pipelines.report import LayerReport, Report
from vidattn.pipelines.settings import Settings
from vidattn.pipelines.site import Site
from vidattn.pipelines.steps import Told
from vidattn.schedule import Schedule


class Handle:
    """A patched pipeline or transformer; leaving a with block unpatches it."""

    def __init__(self, pipe: object | None, transformers: dict[str, nn.Module], settings: Settings):
        self._pipe, self._settings = pipe, settings
        self._calls: Calls | None = None
        self._undo: list[Callable[[], None]] = []
        self.sites: list[Site] = []
        self._is_on = True
        try:
            for name, model in transformers.items():
                self.sites.append(Site(name, model, settings, self))
                if settings.repeats_after is not None:
                    self._undo.append(riflex.install(model, settings.repeats_after))
            settings.schedule.check({site.name: site.shape for site in self.sites})
            if pipe is not None:
                self._calls = Calls(pipe, self, settings.generations, self._begin, self._finish)
        except BaseException:
            self.remove()
            raise

    @property
    def schedule(self) -> Schedule:
        """Which method serves what; a method alone is a schedule of one rule."""
        return self._settings.schedule

    @contextmanager
    def generation(self, num_steps: int | None = None) -> Iterator[Told]:
        """Say which steps a loop of your own is at; a with block is one video.

        Pipelines of diffusers need none of this, nor do loops ``for t in timesteps`` in which the
        transformer is given ``t`` as it is: their steps are read. Of other loops nothing is known:
        the distinct times that the transformer is given are counted, and no plan is kept from one
        forward pass to the next.

        Args:
            num_steps: how many steps there will be, for schedules with fractions of them.

        Yields:
            What is told each step: ``generation.at(0)`` before the first, and so on.

        Raises:
            ValueError: no positive number of steps.

        >>> with handle.generation(num_steps=len(times)) as generation:
        ...     for step, time in enumerate(times):
        ...         generation.at(step)
        ...         velocity = transformer(latents, time.expand(1) / 1000, text)
        """
        if num_steps is not None and (type(num_steps) is not int or num_steps < 1):
            raise ValueError(f"num_steps must be a positive integer or None, got {num_steps!r}")
        told = Told(num_steps)
        with self._settings.generations.begin(), self._settings.steps.telling(told):
            yield told

    def report(self) -> Report:
        """What happened in the generation that ran last.

        That is a call of a pipeline, with all sections of a long video, or what stood in a block
        of ``generation``; what runs outside of both adds up from patching on.
        """
        last = self._settings.generations.latest
        times = {}
        transformer_ms = sum(diary.time.read_ms() for diary in last.diaries.values())
        if last.total_ms is not None:
            vae, text_encoder = last.vae.read_ms(), last.text_encoder.read_ms()
            times = {
                "vae_ms": vae,
                "text_encoder_ms": text_encoder,
                "rest_ms": max(last.total_ms - transformer_ms - vae - text_encoder, 0.0),
                "total_ms": last.total_ms,
            }
        grids = {grid for diary in last.diaries.values() for grid in diary.grids}
        return Report(
            method=self.schedule.name,
            dense_layers=self.schedule.guard.layers,
            dense_steps=self.schedule.guard.steps,
            grids=tuple(sorted(grids, key=str)),
            num_steps=last.num_steps,
            num_passes=sum(diary.num_passes for diary in last.diaries.values()),
            layers=tuple(layer for site in self.sites for layer in _layer_reports(site, last)),
            transformer_ms=transformer_ms,
            plan_ms=last.plan_time.read_ms(),
            **times,
        )

    def parameters(self) -> list[nn.Parameter]:
        """What learned methods such as "vsa" have in all layers, to be trained beside the model.

        They stand in the attention layers until the patch is removed, and stay in the handle.
        """
        modules = (module for site in self.sites for module in site.learned.modules.values())
        return [parameter for module in modules for parameter in module.parameters()]

    def save_parameters(self, path: str | Path) -> None:
        """Write them as a safetensors file, which ``load_parameters`` reads.

        Raises:
            ValueError: no method of the patch has any.
        """
        state = {
            f"{site.name}.{key}": value.detach().cpu().contiguous()
            for site in self._learned_sites()
            for key, value in site.learned.state().items()
        }
        save_file(state, path)

    def load_parameters(self, source: str | Path | Mapping[str, Tensor]) -> None:
        """Give learned methods the parameters of a file, a folder of files, or a state.

        It may hold a whole model, such as the folder "transformer" of a FastWan model with its
        ``to_gate_compress``; what else is in there is left alone.

        Raises:
            ValueError: no method of the patch has parameters, or those of some layer are missing,
                of another shape, or of a layer that stays dense.

        >>> handle = vidattn.patch(pipe, "vsa", density=0.2, dense_layers=0, dense_steps=0)
        >>> handle.load_parameters("FastWan2.1-T2V-1.3B-Diffusers/transformer")
        """
        sites, state = self._learned_sites(), read_state(source)
        for site in sites:
            site.learned.load(state, keys_of(state, site.name, [site.name for site in sites]))

    def _learned_sites(self) -> list[Site]:
        """Those whose layers have parameters of a method."""
        if found := [site for site in self.sites if site.learned.modules]:
            return found
        raise ValueError(f"{self.schedule.name} has no method with parameters, such as vsa or sla")

    def before_remove(self, step: Callable[[], None]) -> Callable[[], None]:
        """Have something undone when the model is unpatched; what forgets about it."""
        self._undo.append(step)
        return lambda: self._undo.remove(step)

    def remove(self) -> None:
        """Unpatch; a second time does nothing."""
        if not self._is_on:
            return
        self._is_on = False
        if self._calls is not None:
            self._calls.remove()
        for undo in list(self._undo):
            undo()
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

    def __repr__(self) -> str:
        guard, state = self.schedule.guard, "" if self._is_on else ", removed"
        layers = ", ".join(f"{len(site.layers)} layers of {site.name}" for site in self.sites)
        return (
            f"<Handle: {self.schedule.name} in {layers}; dense_layers={guard.layers}, "
            f"dense_steps={guard.steps}{state}>"
        )

    def _begin(self) -> None:
        """A call of the pipeline begins.

        Raises:
            RuntimeError: it has another transformer than was patched, or one more, and strict.
        """
        parts = parts_of(self._pipe)
        assert parts is not None
        for site in self.sites:
            if parts.get(site.name) is not site.model:
                raise RuntimeError(
                    f"the {site.name} of this pipeline is not the one that was patched: unpatch, "
                    "then patch again"
                )
            site.put_in()
        known = {id(site.model) for site in self.sites}
        new = [name for name, x in transformers_of(parts).items() if id(x) not in known]
        if new and self._settings.strict:
            raise RuntimeError(
                f"the {new[0]} of this pipeline was put in after patching and would run dense: "
                "unpatch, then patch again, or patch with strict=False"
            )

    def _finish(self, generation: Generation) -> None:
        for site in self.sites:
            site.passes.check_finite()
            diary = generation.diaries[site.name]
            if diary.num_passes:
                site.check_ran({i for i, tally in diary.tallies.items() if tally.num_calls})
        passes = (diary.num_passes for diary in generation.diaries.values())
        if self._settings.strict and not any(passes):
            raise RuntimeError(
                "the pipeline ran without its patched transformer, so nothing was sparse: patch "
                "what it runs, or patch with strict=False"
            )


def find_handle(model: nn.Module) -> Handle | None:
    """The handle of a patched transformer, None for one that is not patched."""
    for hook in model._forward_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, RootHook) and owner.site is not None:
            site: Any = owner.site
            return site.handle
    return None


def handle_of(pipe: object) -> Handle | None:
    """The handle of a patched pipeline, None for one that is not patched."""
    if not hasattr(pipe, "__dict__"):
        return None
    found: list[Any] = [mark.handle for mark in marks(pipe) if isinstance(mark, Calls)]
    return found[0] if found else None


def _layer_reports(site: Site, last: Generation) -> list[LayerReport]:
    diary = last.diaries[site.name]
    pairs = [(layer, diary.tallies[layer.index]) for layer in site.layers]
    return [
        LayerReport(
            name=f"{site.name}.{layer.name}",
            num_sparse=tally.num_sparse,
            num_dense=dict(tally.num_dense),
            methods={
                "; ".join(part.label for part in parts): calls
                for parts, calls in tally.parts.items()
            },
            engines=dict(tally.engines),
            dense_engines=dict(tally.dense_engines),
            density=tally.density_sum / tally.num_sparse if tally.num_sparse else None,
            num_searches=diary.searches[layer.index].num,
            recall=diary.searches[layer.index].recall,
            attention_ms=tally.time.read_ms(),
        )
        for layer, tally in pairs
    ]
