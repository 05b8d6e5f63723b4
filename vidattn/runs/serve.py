"""What is known of a run before its weights are loaded, and what of it cannot be done."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vidattn.catalog import describe, list_sparse_methods
from vidattn.choice import Choice, parse_choice
from vidattn.grid import Grid
from vidattn.methods import create_method
from vidattn.pipelines.heads import check_apart
from vidattn.pipelines.patch import patch
from vidattn.runs.choices import DEFAULT_METHOD, AllMethods, PresetChoice, ScheduleChoice, Served
from vidattn.runs.clip import Guards
from vidattn.runs.folder import find_model
from vidattn.runs.model import find_device, load_pipeline, pipeline_config
from vidattn.runs.request import Request, resolve
from vidattn.runs.skeleton import skeleton, video_grid
from vidattn.schedule_file import load_schedule


@dataclass(frozen=True)
class Outlook:
    """A run to come.

    Args:
        pipe: the pipeline without weights, None where it cannot be had without.
        requests: with the defaults of the pipeline, where it is known.
        grid: the tokens of the video, where they are known.
    """

    pipe: object | None
    requests: list[Request]
    grid: Grid | None

    def default(self) -> Choice | PresetChoice:
        """What is run where nobody says: the preset of the model, or else the default method."""
        try:
            with patch(self.pipe) as handle:
                preset = PresetChoice(handle.schedule.name)
        except ValueError:
            print(f"no method given, and no preset for this model: taking {DEFAULT_METHOD}")
            return parse_choice(DEFAULT_METHOD)
        print(f"no method given: taking the preset of this model, {preset.label}")
        return preset

    def check(
        self,
        choice: Served,
        guards: Guards,
        *,
        are_spread: bool = False,
        parameters: Path | None = None,
    ) -> None:
        """Refuse what the model or the size of the video rules out.

        Args:
            are_spread: whether processes share the heads of a layer.
            parameters: of learned methods.

        Raises:
            ValueError: a bad value, a method that cannot serve the grid, or one for another model.
        """
        if isinstance(choice, Choice):
            choice.create()
        elif isinstance(choice, ScheduleChoice):
            load_schedule(choice.where)
        if self.pipe is None:
            return
        with patch(self.pipe, **choice.arguments, **vars(guards)) as handle:
            for rule in handle.schedule.rules:
                if are_spread:
                    check_apart(rule.method)
                if self.grid is not None:
                    rule.method.check(self.grid)
            if parameters is not None:
                handle.load_parameters(parameters)

    def everything(self, wanted: AllMethods, guards: Guards) -> tuple[list[Choice], dict[str, str]]:
        """Every method that reads less, at a density, and why others are left out, by label.

        A method without such an option gets a window of that density; where the grid is not known
        before the run it stays as it is.
        """
        found, left_out = [], {}
        for name in list_sparse_methods():
            choice = Choice(name)
            try:
                choice = choice_at(name, wanted.density, self.grid)
                self.check(choice, guards)
                found.append(choice)
            except ValueError as error:
                left_out[choice.label] = str(error)
        return found, left_out

    def load(self, args: argparse.Namespace) -> tuple[object, list[Request]]:
        """The pipeline, and what it is asked for."""
        pipe = load_pipeline(args)
        if self.pipe is not None:
            return pipe, self.requests
        return pipe, [resolve(pipe, request) for request in self.requests]


def foresee(args: argparse.Namespace, requests: Sequence[Request]) -> Outlook:
    """Look ahead, without loading weights.

    Raises:
        ValueError: a device or model that is not there, or a request that the pipeline refuses.
    """
    find_device(args.device, args.offload)
    where = find_model(args.model)
    pipe = skeleton(where, pipeline_config(where))
    if pipe is None:
        return Outlook(None, list(requests), None)
    requests = [resolve(pipe, request) for request in requests]
    return Outlook(pipe, requests, video_grid(pipe, requests[0]))


def choice_at(name: str, density: float | None, grid: Grid | None) -> Choice:
    """A method with a density, or with the window that has it; as it is where there is neither."""
    if density is None:
        return Choice(name)
    if "density" in describe(name).options:
        return Choice(name, {"density": density})
    method = create_method(name)
    found = grid and method.with_density(density, grid)
    changed = {key: x for key, x in vars(found or method).items() if x != getattr(method, key)}
    return Choice(name, changed)
