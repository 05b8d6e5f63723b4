"""Recall and output error on real motion at 32,760 tokens: python scripts/bench_recall.py.

Clips of 81 frames of 480x832 come out of a package pinned by checksum, of which nothing is
installed or run; motion_latents.py says how they become queries, keys and values. Writes
recall.json and recall.md.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from benchmarks.density_choices import add_density_arguments, choices_at
from benchmarks.motion_latents import fit_pca, heads_of, read_clip, tokens_of
from fetching.packages import ROBOT_CLIPS, unpack
from torch import Tensor

from vidattn.choice import Choice
from vidattn.grid import Grid
from vidattn.methods import create_method
from vidattn.planning.reading import Reading
from vidattn.quality.fidelity import fidelity
from vidattn.runs.hardware import hardware
from vidattn.runs.output import writable_folder, write_atomically, write_json

FOLDER = "media/videos/whitepaper_figure_5"
CLIPS = {
    "pouring": f"{FOLDER}/2_meshcup_pouring.mp4",
    "picking": f"{FOLDER}/1_pnp_1.mp4",
}
# the encoder is fitted to clips that are not measured
FITTED = (f"{FOLDER}/0_counterfactual_1.mp4", f"{FOLDER}/3_sim_microwave.mp4")
NOTES = """\
Clips out of the package {package}: {clips}; {tokens:,} tokens ({grid}), {heads} heads of
{head_dim}. Dense attention puts {top:.0%} of its mass on the best tenth of the keys. Latents are a
PCA of patches fitted to two other clips, queries and keys one fixed random projection of them,
normalized and rotated as in Wan: real motion, but no trained model. recall: share of dense
attention's mass on the pairs that are read. error: of the output, relative root mean square. Both
are means over clips and heads, on {queries} random queries. Methods stand in the order of their
error.
"""


def main() -> None:
    """Fetch, encode, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_density_arguments(parser)
    parser.set_defaults(densities=(0.1, 0.25))
    parser.add_argument("--clips", type=int, default=len(CLIPS), help="how many clips")
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--queries", type=int, default=256, help="sampled queries")
    parser.add_argument("--work", type=Path, default=Path("runs/recall"))
    parser.add_argument("--out", type=Path, default=Path("assets/benchmarks"))
    args = parser.parse_args()
    out = writable_folder(args.out, "--out")
    unpack(ROBOT_CLIPS, args.work)
    pca = fit_pca([read_clip(args.work / path) for path in FITTED])
    clips = {name: read_clip(args.work / CLIPS[name]) for name in list(CLIPS)[: args.clips]}
    sources = {name: tokens_of(pca.encode(clip)) for name, clip in clips.items()}
    report = measure(sources, args)
    report["command"] = shlex.join(["python", "scripts/bench_recall.py", *sys.argv[1:]])
    report["hardware"] = hardware() | {"torch": torch.__version__}
    write_json(out / "recall.json", report)
    with write_atomically(out / "recall.md") as partial:
        partial.write_text(to_markdown(report), encoding="utf-8")
    print(f"wrote {out / 'recall'}.json and .md")


def measure(sources: dict[str, tuple[Tensor, Grid]], args: argparse.Namespace) -> dict:
    """The figures of every method on the tokens of some clips."""
    rows: dict[str, dict] = {}
    top = []
    for name, (tokens, grid) in sources.items():
        qkv = heads_of(tokens, grid, num_heads=args.heads)
        source = torch.Generator().manual_seed(1)
        queries = torch.randperm(grid.num_tokens, generator=source)[: args.queries]
        top.append(best_tenth(qkv[0], qkv[1], queries))
        for asked, choice in choices_at(args.densities, grid, args.methods, args.plain):
            row = rows.setdefault(
                choice.label, {"label": choice.label, "asked": asked, "clips": {}}
            )
            row["clips"][name] = figures = measure_method(choice, grid, qkv, queries)
            print(name, choice.label, figures)
    return {
        "package": ROBOT_CLIPS.name,
        "clips": list(sources),
        "grid": list(grid.size),
        "heads": args.heads,
        "head_dim": qkv[0].shape[-1],
        "queries": args.queries,
        "best_tenth": sum(top) / len(top),
        "rows": list(rows.values()),
    }


def best_tenth(q: Tensor, k: Tensor, queries: Tensor) -> float:
    """The share of attention on the best tenth of the keys, mean over heads and queries."""
    shares = []
    for some in queries.split(64):
        weights = (q[:, :, some] @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        shares.append(weights.topk(k.shape[2] // 10, dim=-1).values.sum(-1).flatten())
    return torch.cat(shares).mean().item()


def measure_method(choice: Choice, grid: Grid, qkv: Sequence[Tensor], queries: Tensor) -> dict:
    """Density, recall and error; the reason where the method cannot do it."""
    method = create_method(choice.name, **choice.options)
    try:
        plan = method.plan(grid, Reading(*qkv[:2]))
    except ValueError as error:
        return {"error": str(error)}
    found = fidelity(*qkv, plan, queries=queries)
    return {
        "density": plan.density,
        "recall": found.recall.mean().item(),
        "output_error": found.output_error.mean().item(),
    }


def to_markdown(report: dict) -> str:
    """One table for each density that was asked for."""
    machine, grid = report["hardware"], report["grid"]
    text = (
        "# Recall on real motion\n\n"
        + NOTES.format(
            package=report["package"],
            clips=" and ".join(report["clips"]),
            tokens=grid[0] * grid[1] * grid[2],
            grid="x".join(map(str, grid)),
            heads=report["heads"],
            head_dim=report["head_dim"],
            top=report["best_tenth"],
            queries=report["queries"],
        )
        + f"\n{machine['num_threads']} threads of {machine['cpu']}, torch {machine['torch']}. "
        f"`{report['command']}`\n"
    )
    refused = []
    for asked in sorted({row["asked"] for row in report["rows"]}):
        lines = []
        for row in report["rows"]:
            figures = list(row["clips"].values())
            if row["asked"] != asked:
                continue
            if errors := [x["error"] for x in figures if "error" in x]:
                refused.append(f"- `{row['label']}`: {errors[0]}\n")
                continue
            names = ("density", "recall", "output_error")
            means = {name: sum(x[name] for x in figures) / len(figures) for name in names}
            lines.append((row["label"], means))
        lines.sort(key=lambda line: line[1]["output_error"])
        text += f"\n## Density {asked:g}\n\n| method | density | recall | error |\n"
        text += "| --- | ---: | ---: | ---: |\n"
        for label, x in lines:
            text += (
                f"| `{label}` | {x['density']:.3f} | {x['recall']:.3f} | "
                f"{x['output_error']:.3f} |\n"
            )
    return text + ("\n## Not possible on this grid\n\n" + "".join(refused) if refused else "")


if __name__ == "__main__":
    main()
