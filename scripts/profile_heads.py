"""Find out which heads of a causal model look only near, as the policy head_classes reads it.

python scripts/profile_heads.py --model FOLDER --out heads.yaml makes a video for each prompt, and
measures the share of the attention of each head that lies on the sink, the last frames and the
chunk itself. `vidattn stream --policy head_classes:file=heads.yaml` then tells them apart at once.
"""

import argparse
import dataclasses
from pathlib import Path

import torch
import yaml
from diffusers import DiffusionPipeline
from tqdm import tqdm

import vidattn
from vidattn.cache import create_policy
from vidattn.cache.head_classes import HeadClasses, HeadProfile, SplitCache
from vidattn.runs.folder import find_causal_model
from vidattn.runs.output import writable_file, write_atomically

PROMPTS = ("a red boot moving right over a dark background", "a blue cup spinning in a street")


def main() -> None:
    """Make the videos, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", metavar="FOLDER", help="default: the bundled causal model")
    parser.add_argument("--recipe", metavar="NAME", help="of a model that does not say its own")
    parser.add_argument("--prompts", nargs="+", default=list(PROMPTS), metavar="TEXT")
    parser.add_argument("--chunks", type=int, default=20, help="of each video")
    parser.add_argument("--window", type=int, default=HeadClasses.window, help="latent frames")
    parser.add_argument("--near", type=int, default=HeadClasses.near, help="latent frames")
    parser.add_argument("--sink", type=int, default=HeadClasses.sink, help="latent frames")
    parser.add_argument("--out", type=Path, default=Path("heads.yaml"), metavar="FILE")
    args = parser.parse_args()
    out = writable_file(args.out, (".yaml", ".yml"))
    options = {name: getattr(args, name) for name in ("window", "near", "sink")}
    # more chunks than are made: heads stay together
    policy = create_policy("head_classes", profile=args.chunks + 1, **options)
    assert isinstance(policy, HeadClasses)
    pipe = DiffusionPipeline.from_pretrained(find_causal_model(args.model))
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    profile = profile_of(pipe, policy, args.prompts, args.chunks, args.recipe)
    with write_atomically(out) as path:
        shares = [list(layer) for layer in profile.shares]
        given = dataclasses.asdict(profile) | {"shares": shares}
        path.write_text(yaml.safe_dump(given, sort_keys=False), encoding="utf-8")
    every = [share for layer in profile.shares for share in layer]
    near = sum(share >= HeadClasses.share for share in every)
    print(f"wrote {out}: {near} of {len(every)} heads look only near")


def profile_of(
    pipe: DiffusionPipeline,
    policy: HeadClasses,
    prompts: list[str],
    chunks: int,
    recipe: str | None,
) -> HeadProfile:
    """The mean over the passes of a step and the videos of some prompts.

    Raises:
        ValueError: the videos are too short for anything to be far.
    """
    seen: list[list[float] | None] = []
    for prompt in tqdm(prompts):
        with vidattn.stream(pipe, policy, prompt=prompt, recipe=recipe) as video:
            for _ in range(chunks):
                next(video)
            caches = [cache for cache in video.caches if isinstance(cache, SplitCache)]
            seen += [cache.shares for cache in caches]
    if any(shares is None for shares in seen):
        raise ValueError(
            f"nothing was far from the {chunks} chunks of a video: give more --chunks, and a "
            "--window with room for more than the sink and what is near"
        )
    site = caches[-1].site
    shares = torch.tensor(seen).view(-1, site.layer + 1, site.heads).mean(0)
    rows = tuple(tuple(round(x, 4) for x in row) for row in shares.tolist())
    return HeadProfile(site.model, policy.near, policy.sink, rows)


if __name__ == "__main__":
    main()
