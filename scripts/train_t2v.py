"""Train the bundled text-to-video model: python scripts/train_t2v.py configs/tiny_t2v.yaml.

Each stage (VAE, encoded clips, transformer, export) resumes from what is under `work`.
"""

import argparse
import shutil
from pathlib import Path

import torch
import yaml
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline
from safetensors.torch import load_file, save_file
from t2v.causal import CausalModel, even_steps
from t2v.flow import FlowModel
from t2v.flow_stages import (
    build_flow_model,
    flow_stage,
    forcing_stage,
    rollout_stage,
    tokenizer_of,
)
from t2v.latents import Pools
from t2v.stage import Clock, load_newest, train_stage
from t2v.team import Team, run_team
from t2v.vae import (
    build_vae,
    decoder_of,
    set_latent_statistics,
    use_training_layers,
    vae_stage,
)
from t2v.worlds import load_world

from vidattn.pipelines.streaming.recipe import Recipe


def clips_of(config: dict):
    """The clips that training sees."""
    return load_world(config["world"]).Clips(config["data"], config["seed"])


def halve(folder: Path) -> None:
    """Store weights in half the size on disk; diffusers loads them as float32."""
    file = folder / "diffusion_pytorch_model.safetensors"
    halves = {key: value.half() for key, value in load_file(file).items()}
    save_file(halves, file, metadata={"format": "pt"})


def export(vae, model: FlowModel, config: dict) -> None:
    """Write the stock WanPipeline folder; other files in it, the card say, stay."""
    tokenizer, out = tokenizer_of(config), Path(config["out"])
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
        halve(partial / part)
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


def export_causal(model: CausalModel, config: dict) -> None:
    """Write the causal transformer beside the other one; it says how it is to be streamed."""
    out, options = Path(config["out"]), config["causal"]
    frames = options["chunk"] * (1 + min(options["windows"]))
    recipe = Recipe(
        chunk=options["chunk"],
        times=tuple(1000 * share for share in even_steps(options["steps"])),
        shift=options["shift"],
        sampler="euler",
        size=tuple(options["clips"][1:]),
        policy=f"rolling:window={frames},sink=0",
    )
    model.transformer.register_to_config(**recipe.to_config())
    folder, partial = out / "transformer_causal", out / "transformer_causal.partial"
    shutil.rmtree(partial, ignore_errors=True)
    model.transformer.save_pretrained(partial, safe_serialization=True)
    halve(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)


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
    pools = Pools(vae, clips, config["flow"]["clips"], work, team)
    stage = flow_stage(config, pools, team)
    if not train_stage(stage, work, team, clock, finish):
        return
    if team.rank == 0:
        export(vae, stage.average, config)
    for make in (forcing_stage, rollout_stage) if "causal" in config else ():
        team.wait()
        stage = make(config, pools, team)
        if not train_stage(stage, work, team, clock):
            return
        if team.rank == 0:
            export_causal(stage.average, config)


def export_newest(config: dict) -> None:
    """Write the pipeline folder from the newest checkpoints, finished or not."""
    model, work = build_flow_model(config), Path(config["work"])
    if not load_newest(work, "flow", {"average": model}):
        raise ValueError(f"{work} has no flow.safetensors; train first, without --export")
    export(load_vae(config, clips_of(config)), model, config)
    model = build_flow_model(config, CausalModel)
    if any(load_newest(work, name, {"average": model}) for name in ("rollout", "forcing")):
        export_causal(model, config)


def read_config(path: str, given: dict) -> dict:
    """The YAML file with what is given in its place, checked for what every stage needs."""
    if not Path(path).is_file():
        raise ValueError(f"no configuration file {path}; the bundled one is configs/tiny_t2v.yaml")
    config = yaml.safe_load(Path(path).read_text())
    needed = {"world", "seed", "processes", "data", "work", "out", "vae", "text", "flow"}
    if missing := sorted(needed - set(config if isinstance(config, dict) else {})):
        raise ValueError(f"{path} lacks {', '.join(missing)}; see configs/tiny_t2v.yaml")
    listed = {tuple(kind["size"]) for kind in config["flow"]["clips"]}
    batches = [b for p in config["flow"]["phases"] for b in p["batches"]]
    used = {tuple(x["clips"]) for x in (*batches, *filter(None, [config.get("causal")]))}
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
