"""A program on the public names, which test_types.py has mypy read as strictly as it can."""

from pathlib import Path

from torch import Tensor, nn

import vidattn
from vidattn import Grid, attend, list_methods, neighborhood_attention, patch, plan, unpatch
from vidattn.backbones import accelerate
from vidattn.backbones.nat import NeighborhoodTransformer, nat_mini
from vidattn.draw import draw
from vidattn.kernels.block_lists import BlockLists
from vidattn.methods import create_method, label
from vidattn.methods.radial import Radial
from vidattn.pipelines.report import LayerReport, Report
from vidattn.plan import AnyPlan, Plan
from vidattn.schedule import Schedule
from vidattn.schedule_file import load_schedule


def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, float]:
    grid = Grid(5, 8, 8, text=7, text_first=True)
    made: AnyPlan = plan("radial", grid, density=0.3)
    kept: float = made.density
    print(made.summary(), made.mask().shape, vidattn.__version__, list_methods()[0])
    first: Plan = made.parts()[0][0]
    lists: BlockLists = first.lists
    print(lists.batch + 1)
    out = attend(q, k, v, made.to(q.device), backend="torch")
    print(out.shape)
    again, lse = attend(q, k, v, made, return_lse=True)
    print(again + lse[..., None])
    near = neighborhood_attention(q, k, v, window=7, dilation=(1, 2), causal=False)
    return near.view(out.shape), kept


def method(grid: Grid) -> str:
    one = Radial(density=0.3)
    print(one.plan(grid).density, create_method("radial", density=0.3) == one)
    draw({"radial": one.plan(grid)})
    return label(one)


def pipeline(pipe: object, transformer: nn.Module) -> list[str]:
    schedule: Schedule = load_schedule(Path("schedule.yaml"))
    with patch(pipe, schedule=schedule, dense_layers=1, dense_steps=0.1) as handle:
        report: Report = handle.report()
        layers: tuple[LayerReport, ...] = report.layers
        print(report, report.to_dict(), report.transformer_ms + report.plan_ms, report.density)
        with handle.generation(num_steps=4) as generation:
            generation.at(0)
    handle = patch(transformer, "radial:density=0.3", strict=False)
    handle.remove()
    unpatch(transformer)
    return [layer.name for layer in layers]


def backbone(images: Tensor) -> int:
    model: NeighborhoodTransformer = nat_mini(num_classes=10)
    other = NeighborhoodTransformer(depths=(2, 2), num_heads=(2, 4), dilations=(1, 1), in_chans=4)
    print(model(images), other.feature_info)
    with accelerate(model) as acceleration:
        count: int = acceleration.num_modules
    return count
