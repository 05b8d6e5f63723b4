"""Train the bundled text-to-video model: python scripts/train_t2v.py configs/tiny_t2v.yaml.

Each stage (VAE, encoded clips, transformer, export) resumes from what is under `work`.
"""

import argparse
import copy
import shutil
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
from t2v.checkpoint import learning_rate, load_checkpoint, save_checkpoint
from t2v.data import Clips, fetch_items, vary_caption
from t2v.flow import (
    FlowModel,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    flow_loss,
)
from t2v.latents import LatentPool, encode_clips
from t2v.muon import Muon
from t2v.team import Team, run_team
from t2v.vae import build_vae, set_latent_statistics, train_vae
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
    pools: dict, phase: dict, clips: Clips, tokenizer, drop: float, place: tuple[int, Team]
):
    """Latents (B, C, t, h, w) with the ids and mask of their captions."""
    step, team = place
    shared = np.random.default_rng((clips.seed, step, 3))
    kind = phase["batches"][shared.choice(len(phase["batches"]), p=phase["shares"])]
    rng = np.random.default_rng((clips.seed, step, 4, team.rank))
    picks = rng.integers(0, 2**31, kind["batch"]).tolist()
    pool = pools[tuple(kind["clips"])]
    latents, scenes = pool.draw(picks, kind["frames"], kind.get("window"))
    captions = ["" if rng.random() < drop else vary_caption(s, rng) for s in scenes]
    tokens = tokenizer(captions, padding=True, return_tensors="pt")
    return latents, (tokens.input_ids, tokens.attention_mask)


def train_flow(config: dict, clips: Clips, work: Path, team: Team) -> tuple[FlowModel, object]:
    """Train the transformer with its text encoder; returns the averaged weights."""
    options, tokenizer = config["flow"], build_tokenizer()
    model = build_flow_model(config, len(tokenizer))
    if config["init"]:
        load_bundle(model, config["init"])
    model.use_training_attention()
    average = copy.deepcopy(model)
    optimizers = flow_optimizers(model, team)
    parts = {"model": model, "average": average} | optimizers
    total = options["phases"][-1]["until"]
    start = load_checkpoint(work / "flow.safetensors", parts)
    pools = {tuple(k["size"]): LatentPool(clips, k["size"], work, team) for k in options["clips"]}
    bar = team.bar(start, total, "flow")
    for step in range(start, total):
        phase = next(p for p in options["phases"] if step < p["until"])
        latents, tokens = draw_batch(
            pools, phase, clips, tokenizer, options["drop_caption"], (step, team)
        )
        loss = flow_loss(model, latents, tokens, phase["shift"], step * team.size + team.rank)
        model.zero_grad(set_to_none=True)
        loss.backward()
        team.average_gradients(model)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for name, optimizer in optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(
                    step, peak=options["peak"][name], total=total, **options["schedule"]
                )
            optimizer.step()
        keep = min(options["ema"], (1 + step) / (10 + step))
        with torch.no_grad():
            for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
                slow.lerp_(fast, 1 - keep)
        team.report(bar, step, {"loss": loss, "norm": norm})
        last = step + 1 == total
        if team.rank == 0 and ((step + 1) % options["save_every"] == 0 or last):
            save_checkpoint(work / "flow.safetensors", step + 1, parts)
    return average, tokenizer


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


def load_vae(config: dict, clips: Clips) -> AutoencoderKLWan:
    """The trained autoencoder with its latent statistics."""
    vae = start_vae(config)
    if not config["vae"]["phases"]:
        return vae.eval().requires_grad_(False)
    if not load_checkpoint(Path(config["work"]) / "vae.safetensors", {"vae": vae}):
        raise ValueError(f"{config['work']} has no vae.safetensors; train first, without --export")
    vae.eval().requires_grad_(False)
    set_latent_statistics(vae, clips, config["vae"]["statistics_clips"])
    return vae


def train(team: Team, config: dict) -> None:
    """Run every stage that is not finished yet."""
    work = Path(config["work"])
    work.mkdir(parents=True, exist_ok=True)
    clips = Clips(config["data"], "train", config["seed"])
    torch.manual_seed(config["seed"])
    if config["vae"]["phases"]:
        train_vae(start_vae(config), clips, config["vae"], work, team)
    team.wait()
    vae = load_vae(config, clips)
    encode_clips(vae, clips, config["flow"]["clips"], work, team)
    model, tokenizer = train_flow(config, clips, work, team)
    if team.rank == 0:
        export(vae, model, tokenizer, config, Path(config["out"]))


def export_newest(config: dict) -> None:
    """Write the pipeline folder from the newest checkpoint, finished or not."""
    tokenizer = build_tokenizer()
    model = build_flow_model(config, len(tokenizer))
    if not load_checkpoint(Path(config["work"]) / "flow.safetensors", {"average": model}):
        raise ValueError(f"{config['work']} has no flow.safetensors; train first, without --export")
    vae = load_vae(config, Clips(config["data"], "train", config["seed"]))
    export(vae, model, tokenizer, config, Path(config["out"]))


def read_config(path: str, given: dict) -> dict:
    """The YAML file with what is given in its place, checked for what every stage needs."""
    if not Path(path).is_file():
        raise ValueError(f"no configuration file {path}; the bundled one is configs/tiny_t2v.yaml")
    config = yaml.safe_load(Path(path).read_text())
    needed = {"seed", "processes", "data", "work", "out", "vae", "text", "flow"}
    if missing := sorted(needed - set(config if isinstance(config, dict) else {})):
        raise ValueError(f"{path} lacks {', '.join(missing)}; see configs/tiny_t2v.yaml")
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
    arguments = parser.parse_args()
    given = {k: getattr(arguments, k) for k in ("data", "work", "out", "init")}
    try:
        config = read_config(arguments.config, {k: v for k, v in given.items() if v})
        fetch_items(config["data"])
        if arguments.export:
            export_newest(config)
    except ValueError as error:
        parser.error(str(error))
    if not arguments.export:
        run_team(config["processes"], train, config)


if __name__ == "__main__":
    main()
