"""What trains on encoded clips: the transformer, and its causal sibling in two stages."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from t2v.causal import CausalModel, Tokens, forcing_loss, rollout_loss
from t2v.flow import (
    FlowModel,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    flow_loss,
)
from t2v.latents import Pools
from t2v.muon import Muon
from t2v.stage import Stage, load_newest, phase_of
from t2v.team import Team
from t2v.worlds import load_world
from transformers import UMT5EncoderModel

Model = TypeVar("Model", bound=FlowModel)


def build_flow_model(config: dict, kind: type[Model] = FlowModel) -> Model:
    """An untrained transformer with its text encoder."""
    vocab_size, width = len(tokenizer_of(config)), config["text"]["width"]
    text_encoder = build_text_encoder(vocab_size, **config["text"])
    channels = config["vae"]["model"]["z_dim"]
    transformer = build_transformer(
        latent_channels=channels, text_width=width, **config["flow"]["model"]
    )
    return kind(transformer, text_encoder)


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
    """Muon for the matrices inside transformer blocks, AdamW for everything else that learns."""
    matrices = [p for p in model.transformer.blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.0)
    return {"muon": Muon(matrices, team, decay=0.01), "adamw": adamw}


class Batches:
    """What the steps of a stage train on: encoded clips with their captions."""

    def __init__(self, config: dict, pools: Pools, team: Team, drop: float) -> None:
        self.seed, self.pools, self.team, self.drop = config["seed"], pools, team, drop
        self.world, self.tokenizer = load_world(config["world"]), tokenizer_of(config)

    def draw(self, kinds: list[dict], shares: list[float], step: int):
        """Latents (B, C, t, h, w) of one kind, with the ids and mask of their captions."""
        shared = np.random.default_rng((self.seed, step, 3))
        kind = kinds[shared.choice(len(kinds), p=shares)]
        rng = np.random.default_rng((self.seed, step, 4, self.team.rank))
        picks = rng.integers(0, 2**31, kind["batch"]).tolist()
        pool = self.pools.of(kind["clips"])
        latents, scenes = pool.draw(picks, kind["frames"], kind.get("window"))
        vary = self.world.vary_caption
        return latents, self.read(
            ["" if rng.random() < self.drop else vary(scene, rng) for scene in scenes]
        )

    def read(self, captions: list[str]) -> Tokens:
        """The ids and the mask of captions."""
        tokens = self.tokenizer(captions, padding=True, return_tensors="pt")
        return tokens.input_ids, tokens.attention_mask


def tokenizer_of(config: dict):
    """The tokenizer of the world's words."""
    world = load_world(config["world"])
    return build_tokenizer(world.WORDS, world.SPELLINGS)


def flow_stage(config: dict, pools: Pools, team: Team) -> Stage:
    """The training of the transformer and its text encoder."""
    options, model = config["flow"], build_flow_model(config)
    if config["init"]:
        load_bundle(model, config["init"])
    model.use_training_attention()
    batches = Batches(config, pools, team, options["drop_caption"])

    def loss_at(step: int) -> dict[str, torch.Tensor]:
        phase = phase_of(options, step)
        latents, tokens = batches.draw(phase["batches"], phase["shares"], step)
        number = step * team.size + team.rank
        return {"loss": flow_loss(model, latents, tokens, phase["shift"], number)}

    return finish_stage("flow", model, loss_at, options, team)


def finish_stage(name: str, model: FlowModel, loss_at: Callable, options: dict, team: Team):
    """A stage with its optimizers and its average; its model is compiled if that is asked for."""
    average = copy.deepcopy(model)
    if options.get("compile"):
        model.compile_blocks()
    return Stage(name, model, flow_optimizers(model, team), loss_at, options, average)


def forcing_stage(config: dict, pools: Pools, team: Team) -> Stage:
    """The training of chunks that go on from real ones; it begins with the transformer."""
    options = config["causal"] | config["causal"]["forcing"]
    model = trained_model(config, "flow")
    batches = Batches(config, pools, team, config["flow"]["drop_caption"])

    def loss_at(latents: torch.Tensor, tokens: Tokens, number: int) -> torch.Tensor:
        return forcing_loss(model, latents, tokens, options, number)

    return _causal_stage("forcing", model, batches, loss_at, options)


def rollout_stage(config: dict, pools: Pools, team: Team) -> Stage:
    """The training of chunks that go on from the model's own, after the one before, guided."""
    options = config["causal"] | config["causal"]["rollout"]
    model = trained_model(config, "forcing")
    teacher = copy.deepcopy(model).requires_grad_(False)
    if options.get("compile"):
        teacher.compile_blocks()
    batches = Batches(config, pools, team, 0.0)

    def loss_at(latents: torch.Tensor, tokens: Tokens, number: int) -> torch.Tensor:
        both = tokens, batches.read([""] * len(latents))
        return rollout_loss(model, teacher, latents, both, options, number)

    return _causal_stage("rollout", model, batches, loss_at, options)


def trained_model(config: dict, stage: str) -> CausalModel:
    """The causal model with what a stage has learned."""
    model = build_flow_model(config, CausalModel)
    load_newest(Path(config["work"]), stage, {"average": model})
    return model.use_training_attention()


def _causal_stage(
    name: str, model: CausalModel, batches: Batches, loss: Callable, options: dict
) -> Stage:
    kind, team = {k: options[k] for k in ("clips", "frames", "batch")}, batches.team

    def loss_at(step: int) -> dict[str, torch.Tensor]:
        latents, tokens = batches.draw([kind], [1.0], step)
        return {"loss": loss(latents, tokens, step * team.size + team.rank)}

    return finish_stage(name, model, loss_at, options, team)
