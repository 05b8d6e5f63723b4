"""Train the bundled text-to-video model: python scripts/train_t2v.py configs/tiny_t2v.yaml.

Each stage (VAE, encoded clips, transformer, export) resumes from what is under `work`.
"""

import argparse
import copy
import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import yaml
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from safetensors.torch import load_file, save_file
from t2v.flow import (
    FlowModel,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    flow_loss,
)
from t2v.latents import LatentPool, encode_clips
from t2v.muon import Muon
from t2v.stage import Clock, Stage, load_newest, phase_of, train_stage
from t2v.team import Team, run_team
from t2v.vae import (
    build_vae,
    decoder_of,
    set_latent_statistics,
    use_training_layers,
    vae_stage,
)
from t2v.worlds import load_world
from transformers import UMT5EncoderModel


def build_flow_model(config: dict, vocab_size: int) -> FlowModel:
    """An untrained transformer with its text encoder."""
    width = config["text"]["width"]
    text_encoder = build_text_encoder(vocab_size, **config["text"])
    channels = config["vae"]["model"]["z_dim"]
    transformer = build_transformer(
        latent_channels=channels, text_width=width, **config["flow"]["model"]
    )
    return FlowModel(transformer, text_encoder)


def load_bundle(model: FlowModel, folder: str) -> None:
    """Fill the model from a pipeline folder."""
    transformer = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    text_encoder = UMT5EncoderModel.from_pretrained(folder, subfolder="text_encoder")
    try:
        model.transformer.load_state_dict(transformer.state_dict())
        model.text_encoder.load_state_dict(text_encoder.state_dict())
    except RuntimeError as error:
        raise ValueError(f"{folder} holds another model than the configuration asks for") from error


def flow_optimizers(model: FlowModel, team: Team) -> dict[str, torch.optim.Optimizer]:
    """Muon for the matrices inside transformer blocks, AdamW for everything else."""
    matrices = [p for p in model.transformer.blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.0)
    return {"muon": Muon(matrices, team, decay=0.01), "adamw": adamw}


def draw_batch(
    pool_of: Callable, phase: dict, world, tokenizer, drop: float, place: tuple[int, int, Team]
):
    """Latents (B, C, t, h, w) with the ids and mask of their captions."""
    seed, step, team = place
    shared = np.random.default_rng((seed, step, 3))
    kind = phase["batches"][shared.choice(len(phase["batches"]), p=phase["shares"])]
    rng = np.random.default_rng((seed, step, 4, team.rank))
    picks = rng.integers(0, 2**31, kind["batch"]).tolist()
    pool = pool_of(*kind["clips"])
    latents, scenes = pool.draw(picks, kind["frames"], kind.get("window"))
    captions = ["" if rng.random() < drop else world.vary_caption(s, rng) for s in scenes]
    tokens = tokenizer(captions, padding=True, return_tensors="pt")
    return latents, (tokens.input_ids, tokens.attention_mask)


def tokenizer_of(config: dict):
    """The tokenizer of the world's words."""
    world = load_world(config["world"])
    return build_tokenizer(world.WORDS, world.SPELLINGS)


def clips_of(config: dict):
    """The clips that training sees."""
    return load_world(config["world"]).Clips(config["data"], config["seed"])


def flow_stage(config: dict, vae: AutoencoderKLWan, clips, team: Team) -> Stage:
    """The training of the transformer and its text encoder on clips, encoded once."""
    options, world, tokenizer = config["flow"], load_world(config["world"]), tokenizer_of(config)
    model = build_flow_model(config, len(tokenizer))
    if config["init"]:
        load_bundle(model, config["init"])
    model.use_training_attention()
    work = Path(config["work"])
    kinds = {tuple(kind["size"]): kind for kind in options["clips"]}

    # Each size is encoded when a phase first needs it.
    @functools.cache
    def pool_of(*size: int) -> LatentPool:
        encode_clips(vae, clips, kinds[size], work, team)
        return LatentPool(clips, kinds[size], work, team)

    def loss_at(step: int) -> dict[str, torch.Tensor]:
        phase = phase_of(options, step)
        latents, tokens = draw_batch(
            pool_of, phase, world, tokenizer, options["drop_caption"], (config["seed"], step, team)
        )
        number = step * team.size + team.rank
        return {"loss": flow_loss(model, latents, tokens, phase["shift"], number)}

    optimizers = flow_optimizers(model, team)
    return Stage("flow", model, optimizers, loss_at, options, average=copy.deepcopy(model))


def export(vae, model: FlowModel, tokenizer, config: dict, out: Path) -> None:
    """Write the stock WanPipeline folder; other files in `out`, the card say, stay."""
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=model.text_encoder,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=config["flow"]["sampling_shift"]),
        transformer=model.transformer,
    )
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial, safe_serialization=True)
    for part in ("transformer", "vae"):
        # Half the size on disk; diffusers loads it as float32.
        file = partial / part / "diffusion_pytorch_model.safetensors"
        halves = {key: value.half() for key, value in load_file(file).items()}
        save_file(halves, file, metadata={"format": "pt"})
    # The name every release of transformers knows; newer ones write an alias of it.
    for name in ("model_index.json", "tokenizer/tokenizer_config.json"):
        text = (partial / name).read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast")
        (partial / name).write_text(text)
    out.mkdir(parents=True, exist_ok=True)
    for item in partial.iterdir():
        if item.is_dir():
            shutil.rmtree(out / item.name, ignore_errors=True)
        item.replace(out / item.name)
    partial.rmdir()


def start_vae(config: dict) -> AutoencoderKLWan:
    """The autoencoder that training begins with."""
    if config["init"]:
        return AutoencoderKLWan.from_pretrained(config["init"], subfolder="vae")
    return build_vae(**config["vae"]["model"])


def load_vae(config: dict, clips) -> AutoencoderKLWan:
    """The trained autoencoder with its latent statistics."""
    vae = start_vae(config)
    if not config["vae"]["phases"]:
        return vae.eval().requires_grad_(False)
    if not load_newest(Path(config["work"]), "vae", {"module": vae}):
        raise ValueError(f"{config['work']} has no vae.safetensors; train first, without --export")
    load_newest(Path(config["work"]), "decoder", {"module": decoder_of(vae)})
    use_training_layers(vae.eval().requires_grad_(False))
    set_latent_statistics(vae, clips, config["vae"]["statistics_clips"])
    return vae


def train(team: Team, config: dict, clock: Clock, finish: bool = False) -> None:
    """Run every stage that is not finished yet, until time is up."""
    work = Path(config["work"])
    work.mkdir(parents=True, exist_ok=True)
    clips = clips_of(config)
    torch.manual_seed(config["seed"])
    if config["vae"]["phases"]:
        stage = vae_stage(start_vae(config), clips, config["vae"], team)
        if not train_stage(stage, work, team, clock):
            return
        team.wait()
    if options := config["vae"].get("decoder"):
        stage = vae_stage(load_vae(config, clips), clips, options, team, decoder_only=True)
        if not train_stage(stage, work, team, clock):
            return
        team.wait()
    vae = load_vae(config, clips)
    stage = flow_stage(config, vae, clips, team)
    if train_stage(stage, work, team, clock, finish) and team.rank == 0:
        export(vae, stage.average, tokenizer_of(config), config, Path(config["out"]))


def export_newest(config: dict) -> None:
    """Write the pipeline folder from the newest checkpoint, finished or not."""
    tokenizer = tokenizer_of(config)
    model = build_flow_model(config, len(tokenizer))
    if not load_newest(Path(config["work"]), "flow", {"average": model}):
        raise ValueError(f"{config['work']} has no flow.safetensors; train first, without --export")
    vae = load_vae(config, clips_of(config))
    export(vae, model, tokenizer, config, Path(config["out"]))


def read_config(path: str, given: dict) -> dict:
    """The YAML file with what is given in its place, checked for what every stage needs."""
    if not Path(path).is_file():
        raise ValueError(f"no configuration file {path}; the bundled one is configs/tiny_t2v.yaml")
    config = yaml.safe_load(Path(path).read_text())
    needed = {"world", "seed", "processes", "data", "work", "out", "vae", "text", "flow"}
    if missing := sorted(needed - set(config if isinstance(config, dict) else {})):
        raise ValueError(f"{path} lacks {', '.join(missing)}; see configs/tiny_t2v.yaml")
    listed = {tuple(kind["size"]) for kind in config["flow"]["clips"]}
    used = {tuple(b["clips"]) for p in config["flow"]["phases"] for b in p["batches"]}
    if missing := sorted(used - listed):
        raise ValueError(f"{path} draws clips of {missing}, which flow.clips does not list")
    return check_init({"init": None} | config | given)


def check_init(config: dict) -> dict:
    """The configuration, if what it asks to begin from is there."""
    if not (folder := config["init"]):
        if not config["vae"]["phases"]:
            raise ValueError("vae.phases is empty, which needs --init with a trained autoencoder")
    elif not (Path(folder) / "model_index.json").is_file():
        raise ValueError(f"{folder} has no model_index.json; give a folder this program wrote")
    return config


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", help="YAML file, for example configs/tiny_t2v.yaml")
    for name in ("data", "work", "out"):
        parser.add_argument(f"--{name}", help=f"folder to use in place of the file's `{name}`")
    parser.add_argument("--init", help="pipeline folder whose weights training begins with")
    parser.add_argument(
        "--export", action="store_true", help="only write the pipeline from the newest checkpoint"
    )
    parser.add_argument("--hours", type=float, default=0, help="stop after about this long ...")
    parser.add_argument(
        "--minutes", type=float, default=0, help="... and that; the default is never"
    )
    parser.add_argument(
        "--finish", action="store_true", help="let the transformer's rate fall from where it is now"
    )
    arguments = parser.parse_args()
    seconds = 3600 * arguments.hours + 60 * arguments.minutes
    if seconds < 0:
        parser.error(f"{seconds} seconds; --hours and --minutes give a time to train")
    given = {k: getattr(arguments, k) for k in ("data", "work", "out", "init")}
    try:
        config = read_config(arguments.config, {k: v for k, v in given.items() if v})
        load_world(config["world"]).fetch_items(config["data"])
        if arguments.export:
            export_newest(config)
        else:
            clock = Clock(seconds or None)
            run_team(config["processes"], train, config, clock, arguments.finish)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
