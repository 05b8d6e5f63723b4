"""How a step is known: by the loop that runs, whatever pipeline, scheduler and thread."""

import ast
import copy
import re
import threading
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.modular_pipelines import ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline import BlockState

import vidattn
from tests.pipelines import tiny_pipes
from tests.pipelines.sparse import WAN
from tests.pipelines.test_site import Rarely
from tests.pipelines.tiny import TINY, build
from tests.pipelines.tiny_pipes import run_joint, run_wan
from vidattn.pipelines.family import known_models
from vidattn.pipelines.loop import find_loop
from vidattn.pipelines.site import Site

QUARTER = {"window": 3, "dense_layers": 0, "dense_steps": 0.25}


@pytest.fixture
def wan():
    return tiny_pipes.wan()


@pytest.fixture
def seen(monkeypatch):
    """(step, number of steps, key) of every forward pass."""
    found, begin = [], Site.begin

    def spy(site, *given):
        begin(site, *given)
        current = site.passes.current()
        found.append((current.step, current.num_steps, current.key))

    monkeypatch.setattr(Site, "begin", spy)
    return found


def calls(handle):
    """Sparse and dense calls of the first layer."""
    layer = handle.report().layers[0]
    return layer.num_sparse, sum(layer.num_dense.values())


def test_another_scheduler_after_patching(wan):
    with vidattn.patch(wan, "neighborhood", **QUARTER) as handle:
        wan.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        run_wan(wan)
        assert calls(handle) == (6, 2)


@pytest.mark.parametrize("order", [2, 1])
def test_schedulers_that_list_times_twice(order, seen):
    pipe = tiny_pipes.cogvideox()
    kind = diffusers.HeunDiscreteScheduler if order == 2 else diffusers.PNDMScheduler
    pipe.scheduler = kind() if order == 2 else kind(skip_prk_steps=True)
    with vidattn.patch(pipe, "neighborhood", window=3, dense_layers=0, dense_steps=0.5) as handle:
        run_joint(pipe, num_inference_steps=10)
    total = len(pipe.scheduler.timesteps)
    assert total == (19 if order == 2 else 11) and len(seen) == total
    assert [step for step, _, _ in seen] == [i // order for i in range(total)]
    assert {num_steps for _, num_steps, _ in seen} == {-(-total // order)}
    dense = 10 if order == 2 else 6
    assert calls(handle) == (total - dense, dense)
    # the two evaluations of a step are told apart
    assert len({(step, key) for step, _, key in seen}) == total


def test_two_steps_of_one_rounded_time(wan, seen):
    wan.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=17.0)

    def rounded(model, args, kwargs):
        return args, kwargs | {"timestep": kwargs["timestep"].bfloat16().float()}

    with vidattn.patch(wan, "neighborhood", **QUARTER) as handle:
        wan.transformer.register_forward_pre_hook(rounded, with_kwargs=True, prepend=True)
        run_wan(wan, num_inference_steps=50, guidance_scale=1.0, num_frames=5)
    assert len({time.bfloat16().item() for time in wan.scheduler.timesteps}) < 45
    assert [step for step, _, _ in seen] == list(range(50))
    assert handle.report().num_steps == 50 and calls(handle) == (37, 13)


def test_a_pipeline_that_skips_the_first_steps(wan, seen):
    other = diffusers.WanVideoToVideoPipeline.from_pipe(wan)
    other.set_progress_bar_config(disable=True)
    video = [torch.rand(3, 80, 112) for _ in range(17)]
    with vidattn.patch(wan, "neighborhood", **QUARTER) as handle:
        options = {"num_inference_steps": 8, "strength": 0.5, "output_type": "latent"}
        other(video, "a dog", "bad", height=80, width=112, max_sequence_length=8, **options)
    assert len(other.scheduler.timesteps) == 8
    assert [(step, total) for step, total, _ in seen] == [(i // 2, 4) for i in range(8)]
    assert calls(handle) == (6, 2)


def test_a_copy_for_a_request_and_a_pipeline_of_the_same_parts(wan):
    with vidattn.patch(wan, "neighborhood", **QUARTER) as handle:
        expected = run_wan(wan, num_inference_steps=8)
        assert calls(handle) == (12, 4)
        request = copy.copy(wan)
        request.scheduler = copy.deepcopy(wan.scheduler)
        assert torch.equal(run_wan(request, num_inference_steps=8), expected)
        # the report is of the latest generation, whoever ran it
        assert calls(handle) == (12, 4) and handle.report().num_steps == 8
        run_wan(copy.copy(wan), num_inference_steps=12)
        assert calls(handle) == (18, 6)


def test_requests_at_the_same_time(wan):
    def request(steps, out):
        pipe = copy.copy(wan)
        pipe.scheduler = copy.deepcopy(wan.scheduler)
        barrier.wait()
        out[steps] = run_wan(pipe, num_inference_steps=steps)

    alone, together = {}, {}
    with vidattn.patch(wan.transformer, Rarely(), dense_layers=0, dense_steps=0.5) as handle:
        barrier = threading.Barrier(1)
        for steps in (6, 4):
            request(steps, alone)
            assert calls(handle) == (steps, steps)
        barrier = threading.Barrier(2)
        threads = [threading.Thread(target=request, args=(n, together)) for n in (6, 4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        steps = handle.report().num_steps
        assert steps in (4, 6) and calls(handle) == (steps, steps)
    for steps, expected in alone.items():
        assert torch.equal(together[steps], expected)


def test_a_generation_that_was_cancelled(wan):
    def cancel(*_):
        raise InterruptedError

    def searches(handle):
        return [layer.num_searches for layer in handle.report().layers]

    with vidattn.patch(wan, Rarely(), dense_layers=0, dense_steps=0) as handle:
        expected = run_wan(wan)
        assert searches(handle) == [4, 4]
        with pytest.raises(InterruptedError):
            run_wan(wan, callback_on_step_end=cancel)
        assert torch.equal(run_wan(wan), expected)
        run_wan(wan, num_inference_steps=1)
        assert torch.equal(run_wan(wan), expected) and searches(handle) == [4, 4]


class Sections(diffusers.DiffusionPipeline):
    """What pipelines for long videos do: walk through times anew, or through the same again."""

    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, sections, steps, kind):
        self.scheduler.set_timesteps(steps)
        timesteps = self.scheduler.timesteps
        for _ in range(sections):
            if kind == "scheduler":
                del timesteps
                for _, t in enumerate(iter(self.scheduler.timesteps)):
                    self.step(t)
                timesteps = None
                continue
            if kind == "anew":
                self.scheduler.set_timesteps(steps)
                timesteps = self.scheduler.timesteps
            for _, t in enumerate(timesteps):
                self.step(t)

    def step(self, time):
        for _ in range(2):
            TINY[WAN].call(self.transformer, timestep=time.expand(2))


@pytest.mark.parametrize("steps", [4, 2, 1])
@pytest.mark.parametrize("kind", ["anew", "again", "scheduler"])
def test_sections_of_a_long_video(kind, steps, seen):
    pipe = Sections(build(WAN), diffusers.FlowMatchEulerDiscreteScheduler())
    Rarely.searches.clear()
    with vidattn.patch(pipe, Rarely(), dense_layers=0, dense_steps=0) as handle:
        pipe(3, steps, kind)
    assert [(i, n) for i, n, _ in seen] == [(i // 2 % steps, steps) for i in range(6 * steps)]
    # of two samples in two passes and two layers, at every second step: no plan goes from one
    # section to the next
    assert len(Rarely.searches) == 3 * 8 * -(-steps // 2)
    assert handle.report().num_steps == 3 * steps and handle.report().num_passes == 6 * steps


def test_frames_at_times_of_their_own(seen):
    config = {**TINY["SkyReelsV2Transformer3DModel"].config, "in_channels": 16, "out_channels": 16}
    parts = tiny_pipes.wan().components
    pipe = diffusers.SkyReelsV2DiffusionForcingPipeline(
        transformer=diffusers.SkyReelsV2Transformer3DModel(**config).eval(),
        **{name: parts[name] for name in ("tokenizer", "text_encoder", "vae", "scheduler")},
    )
    pipe.set_progress_bar_config(disable=True)
    with vidattn.patch(pipe, "neighborhood", **QUARTER) as handle:
        run_wan(pipe, base_num_frames=17, ar_step=1)
    # four steps, of which each of the five latent frames is one behind the frame before
    passes = [((0, "cond", 0), (0, "uncond", 0))[i % 2] for i in range(16)]
    assert seen == [(i // 2, 8, key) for i, key in enumerate(passes)]
    assert calls(handle) == (12, 4)


def test_a_walk_that_leaves_the_last_time_out(wan, seen):
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=4, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5, patch_size=1,
    )  # fmt: skip
    pipe = diffusers.LTXI2VLongMultiPromptPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(),
        vae,
        wan.text_encoder,
        wan.tokenizer,
        build("LTXVideoTransformer3DModel"),
    )
    pipe.set_progress_bar_config(disable=True)
    with vidattn.patch(pipe, "neighborhood", window=3, dense_layers=0, dense_steps=0.5) as handle:
        sizes = {"height": 32, "width": 64, "num_frames": 25, "max_sequence_length": 8}
        tiles = {"temporal_tile_size": 16, "temporal_overlap": 8}
        pipe(prompt="a|b", negative_prompt="c", num_inference_steps=5, **sizes, **tiles)
    # three windows of the long video
    assert [(step, total) for step, total, _ in seen] == [(i % 4, 4) for i in range(12)]
    assert calls(handle) == (6, 6) and handle.report().num_steps == 12


def test_stages_of_one_video(wan, seen):
    config = {**TINY["HeliosTransformer3DModel"].config, "in_channels": 16, "out_channels": 16}
    parts = {name: getattr(wan, name) for name in ("tokenizer", "text_encoder", "vae")}
    pipe = diffusers.HeliosPyramidPipeline(
        scheduler=diffusers.HeliosScheduler(stages=2),
        transformer=diffusers.HeliosTransformer3DModel(**config).eval(),
        **parts,
    )
    pipe.set_progress_bar_config(disable=True)
    Rarely.searches.clear()
    with vidattn.patch(pipe, Rarely(), dense_layers=0, dense_steps=0.25) as handle:
        size = {"height": 64, "width": 64, "num_frames": 18, "max_sequence_length": 8}
        options = {"num_latent_frames_per_chunk": 3, "output_type": "latent"}
        options["pyramid_num_inference_steps_list"] = [3, 5]
        pipe("a dog", negative_prompt="bad", **size, **options)
    # two chunks, each in two stages that get larger
    names = ("cond", "uncond")
    assert seen == [(i // 2 % 8, 8, (0, names[i % 2], 0)) for i in range(32)]
    assert calls(handle) == (24, 8) and handle.report().num_steps == 16
    assert len(handle.report().grids) == 2


def test_modular_blocks(wan, seen):
    from diffusers.modular_pipelines.wan import WanBlocks

    pipe = WanBlocks().init_pipeline()
    names = ("transformer", "scheduler", "vae", "text_encoder", "tokenizer")
    pipe.update_components(**{name: getattr(wan, name) for name in names})
    with vidattn.patch(wan, "neighborhood", **QUARTER) as handle:
        generator = torch.Generator().manual_seed(0)
        options = {"max_sequence_length": 8, "output_type": "pt", **tiny_pipes.WAN_CALL}
        pipe(prompt="a dog", negative_prompt="bad", generator=generator, **options)
    assert seen == [(i // 2, 4, (0, None, i % 2)) for i in range(8)]
    assert calls(handle) == (6, 2)


def test_every_loop_of_diffusers_is_one_that_is_read():
    walked = {
        ("t", "timesteps"),
        ("t", "step_matrix"),
        ("t", "block_state.timesteps"),
        ("t", "self.progress_bar(self.scheduler.timesteps[:-1])"),
        ("t", "self.scheduler.timesteps"),
        ("t", "self.progress_bar(timesteps)"),
        ("t", "self.progress_bar(self.scheduler.timesteps)"),
        # the scheduler's by another name, and those of a prior, which is another model
        ("t", "self.progress_bar(timesteps_tensor)"),
        ("t", "self.progress_bar(prior_timesteps_tensor)"),
        # of the block's state
        ("sigma", "sigmas[:-1]"),
    }
    loops = list(denoising_loops())
    assert len(loops) > 50
    for where, target, times in loops:
        assert (target, times) in walked, f"{where}: for {target} in {times}"


def denoising_loops():
    """File, variables and iterable of the loops around every call of a transformer we know."""
    root, known = Path(diffusers.__file__).parent, re.compile("|".join(known_models()))
    for path in sorted([*root.glob("pipelines/*/*.py"), *root.glob("modular_pipelines/*/*.py")]):
        source = path.read_text(encoding="utf-8")
        if not known.search(source):
            continue
        for loop in ast.walk(ast.parse(source)):
            if isinstance(loop, ast.For) and ast.unparse(loop.iter).startswith("enumerate("):
                inside = ast.unparse(loop.body)
                *_, entry = (x.id for x in ast.walk(loop.target) if isinstance(x, ast.Name))
                # the sections of a long video have loops of their own inside
                is_innermost = not re.search(r"for .* in enumerate\(.*timesteps", inside)
                if is_innermost and re.search(r"scheduler\.step\(|loop_step\(", inside):
                    yield str(path.relative_to(root)), entry, ast.unparse(loop.iter.args[0])


def test_a_loop_over_numbers(seen):
    # modular Echo walks through numbers, without a scheduler
    class Denoise(ModularPipelineBlocks):
        def __call__(self, components, block_state):
            sigmas = block_state.sigmas
            for i, sigma in enumerate(sigmas[:-1]):
                self.step(components, block_state, i, sigma)

        def step(self, components, block_state, i, sigma):
            for _ in range(2):
                TINY[WAN].call(components)

    model = build(WAN)
    with vidattn.patch(model, "neighborhood", **QUARTER), torch.no_grad():
        for _ in range(2):
            Denoise()(model, BlockState(sigmas=[1.0, 0.75, 0.75, 0.5, 0.0]))
    assert seen == [(i // 2, 4, (0, None, i % 2)) for i in range(8)] * 2


@torch.no_grad()
def test_a_loop_of_our_own_that_is_like_those(seen):
    model, scheduler = build(WAN), diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)

    def denoise(scheduler, scale):
        for t in scheduler.timesteps:
            TINY[WAN].call(model, timestep=t.expand(2) * scale)

    with vidattn.patch(model, "neighborhood", **QUARTER) as handle:
        denoise(scheduler, 1.0)
        assert seen == [(i, 4, (0, None, 0)) for i in range(4)]
        with pytest.raises(ValueError, match="nothing says how many there are"):
            # given another time than that of the loop, which may be over
            denoise(scheduler, 0.001)
        assert handle.report().num_steps == 5


@torch.no_grad()
def test_steps_that_are_told(seen):
    model = build(WAN)
    with vidattn.patch(model, "neighborhood", **QUARTER) as handle:
        for _ in range(2):
            with handle.generation(num_steps=4) as generation:
                for step in range(4):
                    generation.at(step)
                    for name in ("cond", "uncond"):
                        with model.cache_context(name):
                            TINY[WAN].call(model, timestep=torch.full((2,), 7.0))
            assert calls(handle) == (6, 2) and handle.report().num_steps == 4
        with handle.generation(num_steps=4) as generation:
            with pytest.raises(RuntimeError, match="before the first was: call at"):
                TINY[WAN].call(model)
            generation.at(2)
            for bad in (1, 4, True, "3"):
                with pytest.raises(ValueError, match="step must be an integer from 2 on and below"):
                    generation.at(bad)
        for bad in (0, 2.5, "4"):
            with pytest.raises(ValueError, match="num_steps must be a positive integer or None"):
                handle.generation(num_steps=bad).__enter__()
    keys = [(0, "cond", 0), (0, "uncond", 0)] * 4
    assert seen == [(i // 2, 4, key) for i, key in enumerate(keys)] * 2
    assert "cache_context" not in vars(model)


@torch.no_grad()
def test_steps_that_the_caches_of_diffusers_are_told(seen):
    model = build(WAN)
    with vidattn.patch(model, "neighborhood", **QUARTER):
        for step in (0, 1, 0, 1, 2):
            with model.cache_context("cond", step_index=step, num_inference_steps=3):
                TINY[WAN].call(model)
    assert seen == [(step, 3, (0, "cond", 0)) for step in (0, 1, 0, 1, 2)]


@torch.no_grad()
def test_a_bare_transformer_keeps_no_plans():
    model = build(WAN)
    Rarely.searches.clear()
    with vidattn.patch(model, Rarely(), dense_layers=0):
        for time in (900.0, 600.0):
            TINY[WAN].call(model, timestep=torch.full((2,), time))
    assert len(Rarely.searches) == 8


def test_no_loop():
    assert find_loop() == (None, None)


def test_a_copy_has_a_cache_context_of_its_own():
    model = build(WAN)
    with vidattn.patch(model, "radial"):
        twin = copy.deepcopy(model)
    with twin.cache_context("cond"), torch.no_grad():
        TINY[WAN].call(twin)


@torch.no_grad()
def test_a_time_that_is_read_anew_for_every_pass():
    """Whether that is the same step is not known, so no plan of one pass may serve the other."""
    model = build(WAN)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(3)
    timesteps = scheduler.timesteps

    def predict(step):
        t = timesteps[step]
        TINY[WAN].call(model, timestep=t.expand(2))

    Rarely.searches.clear()
    with vidattn.patch(model, Rarely(), dense_layers=0) as handle:
        for step in range(3):
            predict(step)
            predict(step)
    # two samples in two layers, in each of six passes
    assert len(Rarely.searches) == 24
    assert handle.report().num_steps == 3 and handle.report().num_passes == 6


@torch.no_grad()
def test_a_time_of_the_schedulers_that_is_read_anew(seen):
    """The first time that is seen stays the first step."""
    model, scheduler = build(WAN), diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(5)

    def predict(index):
        t = scheduler.timesteps[index]
        TINY[WAN].call(model, timestep=t.expand(2))

    with vidattn.patch(model, "neighborhood", **QUARTER) as handle:
        for index in (1, 1, 2, 2, 3, 3):
            predict(index)
    assert [(step, total) for step, total, _ in seen] == [(i // 2, 4) for i in range(6)]
    assert handle.report().num_steps == 3


def test_training_leaves_no_plan_to_the_next_clip():
    class Trainer:
        model, scheduler = build(WAN).train(), diffusers.FlowMatchEulerDiscreteScheduler()

        def step(self, index):
            t = self.scheduler.timesteps[index]
            TINY[WAN].call(self.model, timestep=t.expand(2))

    trainer = Trainer()
    Rarely.searches.clear()
    with vidattn.patch(trainer.model, Rarely(), dense_layers=0):
        for index in (300, 301):
            trainer.step(index)
    assert len(Rarely.searches) == 8
