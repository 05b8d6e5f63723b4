"""Low-rank updates load where they are meant to, and the model answers as it was trained to."""

import pytest
import torch
import train_video as program
from diffusers import DiffusionPipeline, WanTransformer3DModel
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from video_training import adapter as adapters
from video_training import trainee as trainees

from tests.pipelines.tiny import TINY, build
from tests.scripts import video_cases as cases
from vidattn.runs.lora import Lora, load_loras, parse_lora

Tune = cases.settings.Tune

EVERY = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")


def trained(model, tune: Tune):
    """A model as if it had been tuned, and the updates that it was tuned by."""
    trainees.prepare_tuning(model, tune)
    found = {k: p for k, p in model.named_parameters() if p.requires_grad}
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in found.values():
            noise = torch.randn(parameter.shape, generator=source)
            parameter.add_(noise * 0.3)
    return adapters.adapter_state(model, found)


def answer(model, key="WanTransformer3DModel"):
    with torch.no_grad():
        return TINY[key].call(model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return cases.write_pipeline(tmp_path_factory.mktemp("pipeline"), "wan two experts")


def transformer(folder, component="transformer"):
    return WanTransformer3DModel.from_pretrained(folder, subfolder=component).eval()


TUNES = {
    "alpha is r": Tune(r=4, lora_alpha=4),
    "alpha": Tune(r=4, lora_alpha=10),
    "rslora": Tune(r=4, lora_alpha=3, use_rslora=True),
    "all layers": Tune(r=3, lora_alpha=5, target_modules=EVERY),
    "pattern": Tune(r=2, lora_alpha=5, target_modules=r".*\.attn1\.to_[qk]"),
    "more": Tune(r=2, lora_alpha=5, target_modules=("time_proj", "linear_1", "proj_out", "to_q")),
    "dora": Tune(r=4, lora_alpha=10, use_dora=True),
}


@pytest.mark.parametrize("layout", ["diffusers", "comfy", "musubi"])
@pytest.mark.parametrize("name", list(TUNES))
def test_every_layout_loads_by_diffusers(folder, tmp_path, name, layout):
    tune, model = TUNES[name], transformer(folder)
    also = () if layout == "diffusers" else (layout,)
    if also and tune.use_dora:
        with pytest.raises(ValueError, match="no place .* for the magnitudes of tune.use_dora"):
            adapters.check_layouts(model, also, True)
        return
    before = answer(model)
    state = trained(model, tune)
    if name == "more" and layout == "musubi":
        with pytest.raises(ValueError, match="'musubi' layout has no keys for .*linear_1"):
            adapters.write_adapter(tmp_path, "transformer", model, state, also, {})
        return
    adapters.check_layouts(model, also, tune.use_dora)
    written = adapters.write_adapter(tmp_path, "transformer", model, state, also, {})
    wanted = answer(model)
    assert (wanted - before).abs().max() > 0.01
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.load_lora_weights(str(written[-1]))
    torch.testing.assert_close(answer(pipe.transformer), wanted, rtol=1e-4, atol=1e-5)
    pipe.unload_lora_weights()
    torch.testing.assert_close(answer(pipe.transformer), before, rtol=0, atol=0)


def test_keys_are_those_of_the_readers(folder, tmp_path):
    model = transformer(folder)
    state = trained(model, Tune(r=4, lora_alpha=8, target_modules=("attn1.to_q", "ffn.net.2")))
    also = ("comfy", "musubi")
    plain, comfy, musubi = (
        load_file(path)
        for path in adapters.write_adapter(tmp_path, "transformer", model, state, also, {})
    )
    assert plain["transformer.blocks.0.attn1.to_q.lora_A.weight"].shape == (4, 24)
    assert len(plain) == 2 * 2 * 2
    down = comfy["diffusion_model.blocks.1.self_attn.q.lora_A.weight"]
    assert comfy["diffusion_model.blocks.1.self_attn.q.alpha"] == 4 == len(down)
    assert "diffusion_model.blocks.0.ffn.2.lora_B.weight" in comfy and len(comfy) == 12
    up = musubi["lora_unet_blocks_1_self_attn_q.lora_up.weight"]
    assert up.shape == (24, 4) and musubi["lora_unet_blocks_1_self_attn_q.alpha"] == 4
    # diffusers reads none of it unless every layer is there
    assert len(musubi) == 2 * 10 * 3
    assert not musubi["lora_unet_blocks_0_cross_attn_v.lora_up.weight"].any()


def test_ltx_in_the_layout_of_comfy(tmp_path):
    key = "LTXVideoTransformer3DModel"
    model = build(key)
    state = trained(model, Tune(r=2, lora_alpha=6))
    adapters.check_layouts(model, ("comfy",), False)
    written = adapters.write_adapter(tmp_path, "transformer", model, state, ("comfy",), {})
    from diffusers import LTXPipeline

    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    pipe = LTXPipeline(transformer=build(key), scheduler=None, **parts)
    pipe.load_lora_weights(str(written[1]))
    torch.testing.assert_close(answer(pipe.transformer, key), answer(model, key))


def test_layouts_that_are_not_known(folder):
    model = build("CogVideoXTransformer3DModel")
    with pytest.raises(ValueError, match="'comfy' layout is not known for CogVideoXTransformer3D"):
        adapters.check_layouts(model, ("comfy",), False)


def test_strengths_are_multiplied_in(folder):
    model = transformer(folder)
    state = trained(model, Tune(r=4, lora_alpha=8, use_rslora=True))
    own = get_peft_model_state_dict(model, adapter_name="default")
    for key, value in state.items():
        factor = 8 / 4**0.5 if "lora_B" in key else 1.0
        torch.testing.assert_close(value, own[key] * factor)


@pytest.fixture(scope="module")
def files(folder, tmp_path_factory):
    """Updates for both experts, and the experts that they make."""
    out, models = tmp_path_factory.mktemp("updates"), {}
    for component in ("transformer", "transformer_2"):
        model = transformer(folder, component)
        state = trained(model, Tune(r=4, lora_alpha=8))
        facts = {"schedule": "rules: []"}
        adapters.write_adapter(out, component, model, state, ("comfy",), facts)
        models[component] = model
    return out, models


def test_updates_go_to_their_experts(folder, files):
    out, models = files
    pipe = DiffusionPipeline.from_pretrained(folder)
    names = ("lora-transformer_2", "lora")
    load_loras(pipe, [parse_lora(str(out / f"{name}.safetensors")) for name in names])
    for component, model in models.items():
        found = answer(getattr(pipe, component))
        torch.testing.assert_close(found, answer(model), rtol=1e-4, atol=1e-5)


def test_updates_are_weighed_and_added(folder, files):
    out, models = files
    pipe = DiffusionPipeline.from_pretrained(folder)
    before = {k: x.clone() for k, x in pipe.transformer.state_dict().items()}
    load_loras(
        pipe, [Lora(out / "lora.safetensors", 0.75), Lora(out / "lora-comfy.safetensors", 0.5)]
    )
    pipe.fuse_lora(adapter_names=["lora_0", "lora_1"])
    pipe.unload_lora_weights()
    full = models["transformer"]
    full.fuse_lora()
    full.unload_lora()
    for key, value in full.state_dict().items():
        wanted = before[key] + 1.25 * (value - before[key])
        torch.testing.assert_close(pipe.transformer.state_dict()[key], wanted, rtol=1e-3, atol=1e-5)


def test_updates_of_another_model_are_refused_by_their_keys(folder, files, tmp_path):
    out, _ = files
    single = DiffusionPipeline.from_pretrained(cases.write_pipeline(tmp_path / "wan", "wan"))
    with pytest.raises(ValueError, match="is for the transformer_2 of a pipeline, which this Wan"):
        load_loras(single, [parse_lora(str(out / "lora-transformer_2.safetensors"))])
    config = TINY["WanTransformer3DModel"].config
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.transformer = WanTransformer3DModel(**config | {"num_layers": 1})
    message = r"another model .*; 16 of 32 keys do not fit:\n  transformer.blocks.1.*no such layer"
    with pytest.raises(ValueError, match=message):
        load_loras(pipe, [Lora(out / "lora.safetensors")])
    pipe.transformer = WanTransformer3DModel(**config | {"attention_head_dim": 24})
    with pytest.raises(ValueError, match=r"lora_A.weight: 24 inputs, the layer has 48"):
        load_loras(pipe, [Lora(out / "lora-comfy.safetensors")])
    assert not getattr(pipe.transformer, "peft_config", None)


def test_files_and_weights_of_the_command_line(files, tmp_path, monkeypatch):
    out, _ = files
    file = out / "lora.safetensors"
    assert parse_lora(str(file)) == Lora(file, 1.0, "transformer", "rules: []")
    assert parse_lora(f"{file}:-0.5").weight == -0.5
    second = parse_lora(str(out / "lora-transformer_2.safetensors"))
    assert second.component == "transformer_2"
    for text, message in (
        (f"{file}:strong", "FILE or FILE:WEIGHT, the weight a number"),
        ("nowhere.safetensors", "'nowhere.safetensors' must be a .safetensors file that exists"),
        (str(out), "must be a .safetensors file"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_lora(text)
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is no safetensors file"):
        parse_lora(str(tmp_path / "a.safetensors"))


def test_merged_weights_answer_like_the_tuned_model(folder, tmp_path):
    model = transformer(folder)
    state = trained(model, Tune(r=4, lora_alpha=8))
    given = {"model": {"name": str(folder)}, "run": {"output": str(tmp_path / "out")}}
    run = cases.make_settings(tmp_path, tmp_path / "out", **given)
    with pytest.raises(ValueError, match="lora.safetensors' is not there yet; train first"):
        program.merge(run)
    adapters.write_adapter(tmp_path / "out", "transformer", model, state, (), {})
    (written,) = program.merge(run)
    merged = WanTransformer3DModel.from_pretrained(written).eval()
    torch.testing.assert_close(answer(merged), answer(model), rtol=1e-4, atol=1e-5)
