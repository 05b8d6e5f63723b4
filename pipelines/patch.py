"""Makes the self-attention of a diffusers video model sparse, in place and reversibly."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from vidattn.choice import parse_choice
from vidattn.methods import create_method, label
from vidattn.pipelines.family import shape_of
from vidattn.pipelines.handle import Handle, find_handle, handle_of
from vidattn.pipelines.models import find_transformers, parts_of, unwrap
from vidattn.pipelines.settings import Settings
from vidattn.planning.method import Method
from vidattn.schedule import DenseGuard, Rule, Schedule
from vidattn.schedule_file import find_presets, list_presets, load_schedule


def patch(
    pipe_or_transformer: object,
    method: str | Method | None = None,
    *,
    schedule: str | Path | Schedule | None = None,
    dense_layers: int | float | None = None,
    dense_steps: int | float | None = None,
    dense_backend: str = "auto",
    repeats_after: float | None = None,
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
        method: a name from ``list_methods()``, also with options as the command line reads them
            ("radial:density=0.3"), or a method with its options set.
        schedule: instead of a method, which of them serves which layers, heads and steps: a YAML
            file, the name of one of the presets for published models (``vidattn list --presets``),
            or a Schedule. Without both, a published model gets its preset.
        dense_layers: first layers of each transformer that stay dense: a count or a fraction; when
            not given 1, or what the schedule says.
        dense_steps: first denoising steps that stay dense: a count, or a fraction of the steps of
            the pipeline; when not given 0.1 for a pipeline and 0 for a transformer, or what the
            schedule says. Each section of a long video has its own. The steps are read from the
            pipeline that runs the transformer; see ``Handle.generation`` for other loops.
        dense_backend: what runs dense calls where the user chose no backend of diffusers: "auto",
            on a CPU our engine where it has measured faster than PyTorch's and PyTorch's otherwise,
            or "pytorch", always PyTorch's. The method "dense" alone is always PyTorch's.
        repeats_after: for longer videos than the model was trained on, the latent frames after
            which it begins anew: 50 of HunyuanVideo and Wan 2.1. The rotation that repeats then
            is slowed (RIFLEx, arXiv:2502.15894), in videos of more frames.
        strict: raise when a layer that should be sparse cannot be; otherwise it runs dense and the
            report says why.
        options: fields of the method.

    Raises:
        ValueError: the model is unknown or cannot be patched, it is patched already, a bad method,
            option, guard or backend, a schedule that is broken or for another model, neither a
            method nor a schedule for a model without a preset, or ``repeats_after`` for one whose
            rotations cannot be slowed.

    >>> with vidattn.patch(pipe, "radial", density=0.25) as handle:
    ...     video = pipe(prompt).frames
    >>> print(handle.report())
    """
    transformers = _unpatched_transformers(pipe_or_transformer)
    pipe = None if isinstance(pipe_or_transformer, nn.Module) else pipe_or_transformer
    if method is schedule is None:
        schedule = _preset(transformers, is_whole=pipe is not None)
    usual = DenseGuard(1, 0.1 if hasattr(pipe, "scheduler") else 0)
    chosen = _schedule(method, schedule, options, usual).with_guard(dense_layers, dense_steps)
    return Handle(pipe, transformers, Settings(chosen, strict, dense_backend, repeats_after))


def _preset(transformers: dict[str, nn.Module], is_whole: bool) -> str:
    """The preset of the model that is to be patched.

    Raises:
        ValueError: there is none, or more than one.
    """
    shapes = {name: shape_of(model) for name, model in transformers.items()}
    found = find_presets(shapes, is_whole)
    if len(found) == 1:
        return found[0]
    first = next(iter(shapes.values()))
    model = f"a {first.transformer} of {first.layers} layers and {first.heads} heads"
    which = f"presets {' and '.join(found)} both are" if found else "no preset is"
    raise ValueError(
        f"patch takes a method or a schedule, got neither, and {which} for {model}: give a method "
        'such as "radial" with density=0.3 (vidattn.list_methods() names them), or schedule= with '
        f"a preset ({', '.join(list_presets())}) or a YAML file"
    )


def _schedule(
    method: str | Method | None,
    schedule: str | Path | Schedule | None,
    options: dict[str, object],
    guard: DenseGuard,
) -> Schedule:
    """The schedule that is asked for, a method being one that serves everything."""
    if method is not None and schedule is not None:
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
    if isinstance(method, str):
        choice = parse_choice(method)
        if twice := sorted(choice.options.keys() & options):
            raise ValueError(f"{method!r} has the options {twice} already: give them once")
        method = create_method(choice.name, **choice.options, **options)
    assert method is not None
    return Schedule((Rule(method),), guard, name=label(method))


def unpatch(pipe_or_transformer: object) -> None:
    """Undo ``patch``: the model computes bit for bit what it did before.

    A transformer that was patched with its pipeline takes the whole pipeline along.

    Raises:
        ValueError: nothing is patched there.
    """
    handle = _handle(pipe_or_transformer)
    if handle is None:
        raise ValueError(f"this {type(pipe_or_transformer).__name__} is not patched")
    handle.remove()


def _handle(pipe_or_transformer: object) -> Handle | None:
    """The handle of what is patched, also where its transformer has gone since."""
    if isinstance(pipe_or_transformer, nn.Module):
        return find_handle(unwrap(pipe_or_transformer))
    if (handle := handle_of(pipe_or_transformer)) is not None:
        return handle
    handles = map(find_handle, (parts_of(pipe_or_transformer) or {}).values())
    return next(filter(None, handles), None)


def _unpatched_transformers(pipe_or_transformer: object) -> dict[str, nn.Module]:
    transformers = find_transformers(pipe_or_transformer)
    patched = {name: x for name, x in transformers.items() if find_handle(x) is not None}
    if handle_of(pipe_or_transformer) is not None:
        patched = {"pipeline": pipe_or_transformer}
    for name, model in patched.items():
        raise ValueError(
            f"{name} ({type(model).__name__}) is patched already: call vidattn.unpatch first"
        )
    return transformers
