"""The pieces of the training program, and a micro run that is cut short and resumed."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import train_t2v as program
import yaml
from diffusers import WanPipeline, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm
from t2v import causal, checkpoint, flow, muon, team
from t2v import stage as stages
from t2v import vae as vaes

import vidattn
from tests.scripts import world_cases as cases
from vidattn.pipelines.streaming.recipe import find_recipe

TOKENIZER = flow.build_tokenizer(cases.scenes.WORDS, cases.scenes.SPELLINGS)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


MICRO_VAE = {"z_dim": 4, "base_dim": 8, "dim_mult": [1, 1, 2], "num_res_blocks": 1}
MICRO_FLOW = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "freq_dim": 16,
}


def micro_model() -> flow.FlowModel:
    torch.manual_seed(0)
    transformer = flow.build_transformer(latent_channels=4, text_width=32, **MICRO_FLOW)
    model = flow.FlowModel(transformer, flow.build_text_encoder(len(TOKENIZER), 32, 2))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    return model.eval()


@pytest.mark.parametrize("frames", [1, 5, 13])
@torch.no_grad()
def test_whole_clip_autoencoder_equals_the_chunked_one(frames):
    torch.manual_seed(1)
    vae = vaes.build_vae(**MICRO_VAE).eval()
    clip = torch.rand(2, 3, frames, 16, 24) * 2 - 1
    moments = vaes.encode_moments(vae, clip)
    assert moments.shape == (2, 8, 1 + (frames - 1) // 4, 2, 3)
    torch.testing.assert_close(moments, vae.encode(clip).latent_dist.parameters)
    latents = moments.chunk(2, dim=1)[0]
    decoded = vaes.decode_clips(vae, latents).clamp(-1, 1)
    torch.testing.assert_close(decoded, vae.decode(latents).sample)


@torch.no_grad()
def test_merged_padding_equals_512_positions():
    model = micro_model()
    captions = ["a fox moving left and a car moving right over the sea", "bus", ""]
    tokens = TOKENIZER(captions, padding=True, return_tensors="pt")
    latents = torch.randn(3, 4, 2, 3, 5)
    sigma = torch.tensor([0.2, 0.6, 1.0])
    text = model.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    text = text * tokens.attention_mask[..., None]
    padded = F.pad(text, (0, 0, 0, flow.CONTEXT - text.shape[1]))
    expected = model.transformer(latents, sigma * 1000, padded, return_dict=False)[0]
    model.use_training_attention()
    merged = model(latents, sigma, tokens.input_ids, tokens.attention_mask)
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_one_padding_key_without_its_bias_differs():
    text, mask = torch.randn(2, 3, 8), torch.tensor([[1, 1, 1], [1, 0, 0]])
    merged, bias = flow.merge_padding(text, mask)
    assert merged.shape == (2, 4, 8) and bias.shape == (2, 1, 1, 4)
    expected = torch.tensor([[0, 0, 0, 509.0], [0, 511.0, 0, 0]]).log()
    expected[0, :3] = expected[1, 0] = 0
    torch.testing.assert_close(bias[:, 0, 0], expected)
    assert merged[1, 1:].abs().sum() == 0


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("A Fox, moving LEFT!", 0),
        ("", 0),
        ("ein blauer Elefant \U0001f418 tanzt", 4),
        ("  Bunny \n", 0),
        ("banana", 0),
        ("sneaker", 1),
        ("x" * 5000, 1),
    ],
)
def test_tokenizer_takes_any_prompt(prompt, unknown):
    ids = TOKENIZER(prompt).input_ids
    assert ids[-1] == 1
    assert ids.count(2) == unknown


def test_orthogonalise_flattens_the_spectrum():
    torch.manual_seed(0)
    matrices = torch.randn(3, 12, 40)
    values = torch.linalg.svdvals(muon.orthogonalise(matrices))
    assert values.min() > 0.5 and values.max() < 1.4
    tall = muon.orthogonalise(matrices.mT)
    torch.testing.assert_close(tall, muon.orthogonalise(matrices).mT, rtol=0.05, atol=0.02)


def micro_config(folder: Path) -> dict:
    """A whole run of every stage in seconds."""
    size, phase = [5, 32, 32], {"shift": 2.0, "shares": [1.0]}
    schedule = {"warmup": 1, "decay": 1}
    return {
        "init": None,
        "world": "emoji",
        "seed": 3,
        "processes": 1,
        "data": str(folder / "data"),
        "work": str(folder / "work"),
        "out": str(folder / "out"),
        "vae": {
            "model": MICRO_VAE,
            "phases": [{"until": 2, "sizes": [[5, 16, 16, 1]], "shares": [1.0]}],
            "kl_weight": 1e-4,
            "peak": {"muon": 1e-3, "adamw": 1e-3},
            "schedule": schedule,
            "save_every": 1,
            "statistics_clips": 1,
        },
        "text": {"width": 32, "layers": 2},
        "flow": {
            "model": MICRO_FLOW,
            "clips": [{"size": size, "count": 3}],
            "phases": [
                phase | {"until": 2, "batches": [{"clips": size, "frames": 1, "batch": 3}]},
                phase | {"until": 4, "batches": [{"clips": size, "frames": 2, "batch": 2}]},
            ],
            "drop_caption": 0.2,
            "ema": 0.9,
            "sampling_shift": 3.0,
            "peak": {"muon": 1e-3, "adamw": 1e-3},
            "schedule": schedule,
            "save_every": 1,
        },
    }


def with_causal(config: dict) -> dict:
    """The same run, and its causal sibling: chunks of one latent frame, two to a clip."""
    flow = config["flow"]
    stage = {k: flow[k] for k in ("ema", "peak", "schedule", "save_every")}
    stage |= {"phases": [{"until": 2}], "past_noise": 0.1, "guidance": 3.0}
    sizes = {"chunk": 1, "clips": flow["clips"][0]["size"], "frames": 2, "batch": 1}
    causal = {"windows": [1], "shift": 3.0, "steps": 2, "forcing": stage, "rollout": stage}
    return config | {"causal": sizes | causal}


def run(config: dict, finish: bool = False) -> None:
    program.train(team.Team(), config, stages.Clock(), finish)


def test_trains_on_from_a_folder(tmp_path):
    first, config = micro_config(tmp_path), micro_config(tmp_path)
    cases.write_sprites(tmp_path / "data")
    run(first)
    config |= {"work": str(tmp_path / "more"), "out": str(tmp_path / "better")}
    config["init"], config["vae"]["phases"] = first["out"], []
    config["flow"]["phases"] = [first["flow"]["phases"][-1] | {"until": 1}]
    run(program.check_init(config))
    files = [Path(c["out"]) / "transformer" / WEIGHTS for c in (first, config)]
    before, after = (checkpoint.load_file(file) for file in files)
    moved = max((after[key] - before[key]).abs().max() for key in before)
    assert 0 < moved < 0.05
    autoencoders = [Path(c["out"]) / "vae" / WEIGHTS for c in (first, config)]
    assert autoencoders[0].read_bytes() == autoencoders[1].read_bytes()
    with pytest.raises(ValueError, match="model_index"):
        program.check_init(config | {"init": str(tmp_path / "nowhere")})
    with pytest.raises(ValueError, match="needs --init"):
        program.check_init(config | {"init": None})


def test_trains_an_autoencoder_on_from_a_folder(tmp_path):
    first, config = micro_config(tmp_path), micro_config(tmp_path)
    cases.write_sprites(tmp_path / "data")
    run(first)
    config |= {"work": str(tmp_path / "more"), "init": first["out"]}
    config["vae"]["phases"] = [config["vae"]["phases"][0] | {"until": 1}]
    clips = program.clips_of(config)
    start = program.start_vae(config).state_dict()
    vae = program.start_vae(config)
    stage = vaes.vae_stage(vae, clips, config["vae"], team.Team())
    assert stages.train_stage(stage, Path(config["work"]), team.Team(), stages.Clock())
    moved = [(value - start[key]).abs().max() for key, value in vae.state_dict().items()]
    assert 0 < max(moved) < 0.05
    loaded = program.load_vae(config, clips)
    torch.testing.assert_close(loaded.state_dict(), vae.state_dict(), rtol=0, atol=0)


def test_decoder_trains_on_with_the_encoder_as_it_is(tmp_path):
    config = micro_config(tmp_path)
    cases.write_sprites(tmp_path / "data")
    run(config)
    clips = program.clips_of(config)
    before = program.load_vae(config, clips).state_dict()
    phases = {
        k: config["vae"][k] for k in ("phases", "kl_weight", "peak", "schedule", "save_every")
    }
    config["vae"]["decoder"] = phases
    run(config)
    moved = {
        key.split(".")[0]
        for key, value in program.load_vae(config, clips).state_dict().items()
        if not torch.equal(value, before[key])
    }
    assert moved == {"decoder", "post_quant_conv"}


def test_compiled_blocks_learn_the_same():
    latents, ids = torch.randn(2, 4, 3, 4, 4), torch.tensor([[3, 4, 1], [5, 1, 0]])
    model, grads = micro_model().use_training_attention(), []
    for change in (lambda: None, lambda: model.compile_blocks("aot_eager")):
        change()
        model.zero_grad()
        flow.flow_loss(model, latents, (ids, (ids > 0).long()), 3.0, 0).backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(grads[1], grads[0], rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("channels_last", [False, True])
def test_training_norm_equals_the_original(channels_last):
    torch.manual_seed(2)
    layer = WanRMS_norm(6, images=False)
    layer.gamma.data = torch.randn_like(layer.gamma)
    clip, weights = torch.randn(2, 6, 3, 5, 7), torch.randn(2, 6, 3, 5, 7)
    if channels_last:
        clip = clip.to(memory_format=torch.channels_last_3d)
    found = []
    for norm in (layer, lambda x: vaes.RootMeanSquareNorm.apply(x, layer.gamma)):
        x = clip.clone().requires_grad_()
        layer.gamma.grad = None
        out = norm(x)
        (out * weights).sum().backward()
        found.append((out, x.grad, layer.gamma.grad))
    torch.testing.assert_close(found[1], found[0])


WEIGHTS = "diffusion_pytorch_model.safetensors"


class Interrupted(Exception):
    """Stands for Ctrl-C."""


# in the transformer, while it goes on from real chunks, and from its own
@pytest.mark.parametrize("stop", [5, 8, 10])
def test_resumed_run_is_bit_equal(tmp_path, monkeypatch, stop):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        cases.write_sprites(folder / "data")
    run(with_causal(micro_config(whole)))

    reports = []
    report = team.Team.report

    def stop_early(self, *arguments):
        reports.append(1)
        if len(reports) == stop:
            raise Interrupted
        report(self, *arguments)

    monkeypatch.setattr(team.Team, "report", stop_early)
    with pytest.raises(Interrupted):
        run(with_causal(micro_config(cut)))
    monkeypatch.setattr(team.Team, "report", report)
    assert (cut / "out").exists() == (stop > 6)
    run(with_causal(micro_config(cut)))
    assert len(reports) == stop

    names = [p.relative_to(whole / "out") for p in (whole / "out").rglob("*.safetensors")]
    assert len(names) == 4
    for name in names:
        expected = checkpoint.load_file(whole / "out" / name)
        found = checkpoint.load_file(cut / "out" / name)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=0)


def test_causal_sibling_learns_in_two_stages_and_shares_the_rest(tmp_path):
    config = with_causal(micro_config(tmp_path))
    cases.write_sprites(tmp_path / "data")
    run(config)
    out = Path(config["out"])
    model = WanTransformer3DModel.from_pretrained(out, subfolder="transformer_causal")
    recipe = find_recipe(model, None)
    assert recipe.levels == tuple(causal.steps_of(2, 3.0)) and recipe.chunk == 1
    assert (recipe.size, recipe.policy) == ((32, 32), "rolling:window=2,sink=0")
    pipe = WanPipeline.from_pretrained(out, transformer=model)
    made = list(vidattn.stream(pipe, prompt="a fox moving left", num_frames=9))
    assert [tuple(frames.shape) for frames in made] == [(n, 3, 32, 32) for n in (1, 4, 4)]
    base, after = (
        WanTransformer3DModel.from_pretrained(out, subfolder=name).state_dict()
        for name in ("transformer", "transformer_causal")
    )
    assert base.keys() == after.keys()
    assert max((after[key] - base[key]).abs().max() for key in base) > 0
    stages_done = {
        name: checkpoint.load_step(Path(config["work"]) / f"{name}_fall.safetensors")
        for name in ("flow", "forcing", "rollout")
    }
    assert stages_done == {"flow": 4, "forcing": 2, "rollout": 2}
    text = [
        program.load_newest(Path(config["work"]), name, {"average": model}) and model.text_encoder
        for name in stages_done
        for model in [program.build_flow_model(config)]
    ]
    for other in text[1:]:
        torch.testing.assert_close(other.state_dict(), text[0].state_dict(), rtol=0, atol=0)


def test_checkpoint_of_another_model_is_refused(tmp_path):
    path = tmp_path / "one.safetensors"
    checkpoint.save_checkpoint(path, {"model": torch.nn.Linear(2, 3)}, step=3)
    assert checkpoint.load_checkpoint(path, {"model": torch.nn.Linear(2, 3)}) == 3
    with pytest.raises(ValueError, match="delete it or"):
        checkpoint.load_checkpoint(path, {"model": torch.nn.Linear(2, 4)})


@pytest.mark.parametrize("text", ["", "seed: 1\n", "- 1\n"])
def test_incomplete_config_is_refused(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="configs/tiny_t2v.yaml"):
        program.read_config(str(path), {})
    with pytest.raises(ValueError, match="no configuration file"):
        program.read_config(str(path) + ".missing", {})


def test_clips_that_are_not_listed_are_refused(tmp_path):
    config = micro_config(tmp_path)
    config["flow"]["phases"][1]["batches"][0]["clips"] = [5, 48, 32]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match=r"\(5, 48, 32\).* flow.clips does not list"):
        program.read_config(str(path), {})
