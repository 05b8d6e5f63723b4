"""Methods with parameters of their own, against their papers' formulas in float64, slowly."""

import copy
import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

import vidattn
from tests.pipelines.sparse import COGVIDEOX, WAN
from tests.pipelines.test_families import relative_rms
from tests.pipelines.tiny import TINY, build
from vidattn.grid import Grid, tile_layout
from vidattn.methods import create_method
from vidattn.methods.vsa import VSA
from vidattn.schedule import Rule, Schedule

HUNYUAN = "HunyuanVideoTransformer3DModel"
TILE = (2, 2, 3)
METHODS = {
    "vsa": {"density": 0.3},
    "sla": {"density": 0.3},
    "sla of the rest": {"density": 0.3, "negligible": 0.25, "features": "elu"},
}
every = pytest.mark.parametrize("name", METHODS)


def create(name):
    return create_method(name.partition(" ")[0], tile=TILE, **METHODS[name])


def patch(model, name, **options):
    method = create(name)
    return vidattn.patch(model, method, **{"dense_layers": 0, "dense_steps": 0, **options})


def randomise(handle, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


class Reference(TorchFunctionMode):
    """Puts a method's formula in float64, tile by tile, in the place of the attention.

    Args:
        layers: the parameters of each attention layer by its path.
    """

    def __init__(self, case, method, model, layers):
        super().__init__()
        self.case, self.method, self.layers, self.calls = case, method, layers, 0
        layout = tile_layout(Grid(*case.size), TILE)
        rows = layout.order.view(-1, layout.block)
        self.tiles = [row[row >= 0].long() for row in rows]
        for path, module in model.named_modules():
            if path in layers:
                see = functools.partial(self.see, path)
                module.register_forward_pre_hook(see, with_kwargs=True)

    def see(self, path, module, args, kwargs):
        self.path, self.hidden = path, args[0] if args else kwargs["hidden_states"]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return self.attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def attention(self, query, key, value, attn_mask=None, **rest):
        q, k, v = query, key, value
        length, num = q.shape[2], self.case.num_video
        if length != k.shape[2] or length < num:
            return F.scaled_dot_product_attention(q, k, v, attn_mask, **rest)
        self.calls += 1
        dtype, (q, k, v) = v.dtype, (x.double() for x in (q, k, v))
        start = self.case.before(length)
        video = slice(start, start + num)
        hidden = self.hidden[:, video] if self.hidden.shape[1] == length else self.hidden
        keep = torch.ones(*q.shape[:2], length, length, dtype=torch.bool)
        added = torch.zeros_like(v)
        for b, h in itertools.product(range(q.shape[0]), range(q.shape[1])):
            found = self.of_head(*(x[b, h, video] for x in (q, k, v)), hidden[b].double(), h)
            keep[b, h, video, video], added[b, h, video] = found
        if attn_mask is not None:
            keep = keep & attn_mask
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        weights = scores.masked_fill(~keep, -torch.inf).softmax(-1).nan_to_num(0.0)
        return (weights @ v + added).to(dtype)

    def of_head(self, q, k, v, hidden, h):
        """(S, S) bool, what is read, and (S, D), what is added."""
        tiles, dim, method = self.tiles, q.shape[-1], self.method
        q_c, k_c, v_c = (torch.stack([x[tile].mean(0) for tile in tiles]) for x in (q, k, v))
        scores = q_c @ k_c.mT / math.sqrt(dim)
        keep, added = torch.zeros(len(q), len(q), dtype=torch.bool), []
        weight, bias = (self.layers[self.path][name].double() for name in ("weight", "bias"))
        for i, tile in enumerate(tiles):
            share = method.density * len(tiles)
            count = max(1, math.ceil(share) if isinstance(method, VSA) else math.floor(share))
            read = {i, *scores[i].topk(count).indices.tolist()}
            for j in read:
                keep[tile[:, None], tiles[j]] = True
            if isinstance(method, VSA):
                rows = slice(h * dim, (h + 1) * dim)
                gate = hidden[tile] @ weight[rows].mT + bias[rows]
                added.append(gate * (scores[i].softmax(-1) @ v_c))
            else:
                added.append(self.linear(q[tile], k, v, scores[i], read) @ weight.mT + bias)
        return keep, torch.cat(added)[torch.cat(tiles).argsort()]

    def linear(self, q, k, v, scores, read):
        """Linear attention of the queries of a tile."""
        left = set(range(len(scores)))
        if self.method.negligible is not None:
            num = math.floor(self.method.negligible * len(scores))
            left -= read | set((-scores).topk(num).indices.tolist())
        keys = [self.tiles[i] for i in sorted(left)]
        keys = torch.cat(keys) if keys else torch.tensor([], dtype=torch.long)
        feature = {"softmax": lambda x: x.softmax(-1), "elu": lambda x: F.elu(x) + 1}
        q, k = map(feature[self.method.features], (q, k[keys]))
        weights = q @ k.mT
        return weights @ v[keys] / (weights.sum(-1, keepdim=True) + 1e-5)


def parameters_by_layer(handle):
    found = {}
    for key, value in handle.sites[0].learned.state().items():
        layer, _, part = key.rpartition(".")
        parts = found.setdefault(layer.rpartition(".")[0], {})
        parts[part] = value.clone().requires_grad_()
    return found


def gradients(model, out):
    model.zero_grad()
    out.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@every
@pytest.mark.parametrize("key", [WAN, HUNYUAN, COGVIDEOX])
def test_output_and_gradient_are_those_of_the_formulas(key, name):
    """On grids that tiles do not divide, two samples, with text beside the video or without."""
    model, case = build(key), TINY[key]
    with patch(model, name) as handle:
        randomise(handle)
        layers = parameters_by_layer(handle)
        out = case.call(model)
        ours = gradients(model, out)
        own = [x.grad for x in handle.parameters()]
        assert handle.report().num_dense == 0
    with Reference(case, create(name), model, layers) as reference:
        expected = case.call(model)
        theirs = gradients(model, expected)
    assert reference.calls == len(layers) and relative_rms(out, expected) < 1e-5
    scale = max(x.abs().max().item() for x in theirs.values())
    for path, gradient in theirs.items():
        torch.testing.assert_close(ours[path], gradient, atol=1e-5 * scale, rtol=1e-4)
    for gradient, x in zip(own, (x for parts in layers.values() for x in parts.values())):
        assert relative_rms(gradient, x.grad) < 1e-4


@every
def test_zero_at_first_and_gone_at_last(name):
    model, case = build(WAN), TINY[WAN]
    dense, names = case.call(model), list(model.state_dict())
    with patch(model, name) as handle:
        layers = parameters_by_layer(handle)
        assert not any(x.any() for parts in layers.values() for x in parts.values())
        fresh = case.call(model)
        randomise(handle)
        assert relative_rms(case.call(model), fresh) > 1e-3
        twin = copy.deepcopy(model)
    assert torch.equal(case.call(model), dense) and list(model.state_dict()) == names
    assert torch.equal(case.call(twin), dense)
    with Reference(case, create(name), model, layers):
        assert relative_rms(fresh, case.call(model)) < 1e-5
    # those of a patch that is off are still there
    assert all(x.any() for x in handle.parameters())


@every
def test_run_again_for_the_backward_pass(name):
    model, case = build(WAN).train(), TINY[WAN]
    with patch(model, name) as handle:
        randomise(handle)
        expected = gradients(model, case.call(model))
        model.enable_gradient_checkpointing()
        for path, gradient in gradients(model, case.call(model)).items():
            assert torch.equal(gradient, expected[path])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_and_in_half_precision(dtype):
    model, case = build(WAN), TINY[WAN]
    with patch(model, "vsa") as handle, torch.no_grad():
        randomise(handle)
        half = model.to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            inputs = {key: x.to(dtype) for key, x in case.inputs().items() if x.dim() > 1}
            out = case.call(half, **{key: x for key, x in inputs.items() if key != "timestep"})
        assert out.isfinite().all()


def test_saved_and_loaded(tmp_path):
    model, case = build(WAN), TINY[WAN]
    with patch(model, "vsa") as handle:
        randomise(handle)
        expected = case.call(model)
        handle.save_parameters(tmp_path / "gates.safetensors")
    with patch(model, "vsa") as handle:
        assert relative_rms(case.call(model), expected) > 1e-3
        handle.load_parameters(tmp_path / "gates.safetensors")
        assert torch.equal(case.call(model), expected)


FORMS = {
    "vsa": ("blocks.{}.to_gate_compress", "model.blocks.{}.attn1.to_gate_compress"),
    "sla": ("blocks.{}.self_attn.attn_op.local_attn.proj_l", "net.blocks.{}.self_attn.proj_l"),
}


@pytest.mark.parametrize(("name", "form"), [(x, form) for x, y in FORMS.items() for form in y])
def test_checkpoints_of_others(tmp_path, name, form):
    """FastWan's and TurboDiffusion's names, among the weights of a whole model in two files."""
    model, case = build(WAN), TINY[WAN]
    width = 24 if name == "vsa" else 12
    weights = torch.randn(2, width, width), torch.randn(2, width)
    for i in range(2):
        state = {f"{form.format(i)}.weight": weights[0][i], f"{form.format(i)}.bias": weights[1][i]}
        state |= {f"blocks.{i}.attn1.to_q.weight": torch.zeros(24, 24)}
        save_file(state, tmp_path / f"model-{i}.safetensors")
    with patch(model, name) as handle:
        handle.load_parameters(tmp_path)
        for i, module in enumerate(handle.sites[0].learned.modules.values()):
            assert torch.equal(module.weight, weights[0][i])
            assert torch.equal(module.bias, weights[1][i])
        assert case.call(model).isfinite().all()


def gates(num=2, width=24, **changes):
    state = {f"blocks.{i}.to_gate_compress.weight": torch.ones(width, 24) for i in range(num)}
    return state | changes


@pytest.mark.parametrize(
    ("name", "state", "options", "message"),
    [
        ("vsa", gates(1), {}, "blocks.1.attn1.to_gate_compress.weight is not among what is loaded"),
        (
            "vsa",
            gates(width=12),
            {},
            r"is \(12, 24\) in what is loaded, and the layer needs \(24, 24",
        ),
        ("vsa", gates(), {"dense_layers": 1}, "patch with dense_layers=0"),
        ("sla", gates(), {}, "blocks.0.attn1.proj_l.weight is not among what is loaded"),
        ("vsa", "nowhere", {}, "'nowhere' must be a .safetensors file, or a folder with some"),
    ],
)
def test_what_does_not_fit_is_refused(name, state, options, message):
    with patch(build(WAN), name, **options) as handle, pytest.raises(ValueError, match=message):
        handle.load_parameters(state)


def test_a_gate_without_a_bias():
    with patch(build(WAN), "vsa") as handle:
        randomise(handle)
        handle.load_parameters(gates())
        for module in handle.sites[0].learned.modules.values():
            assert module.weight.eq(1).all() and not module.bias.any()


def test_what_cannot_be_is_refused():
    model = build(WAN)
    by_head = Schedule((Rule(create("vsa"), heads=(0,)), Rule(create_method("radial"))))
    with pytest.raises(ValueError, match=r"VSA is for all heads of a layer, got a rule for heads"):
        vidattn.patch(model, schedule=by_head)
    with vidattn.patch(model, "topk") as handle:
        assert handle.parameters() == []
        with pytest.raises(ValueError, match="topk has no method with parameters"):
            handle.save_parameters("gates.safetensors")
    with patch(model, "vsa"), torch.no_grad():
        compiled = torch.compile(model, backend="eager")
        with pytest.raises(RuntimeError, match="run it without torch.compile"):
            TINY[WAN].call(compiled)


@pytest.mark.parametrize("name", ["vsa", "sla"])
def test_training_brings_a_sparse_model_nearer_to_the_dense_one(name):
    """A low-rank adapter and the parameters of the method, by one optimizer."""
    from peft import LoraConfig

    model, case = build(WAN), TINY[WAN]
    with torch.no_grad():
        dense = case.call(model)
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"]))
    with patch(model, name) as handle:
        with torch.no_grad():
            before = relative_rms(case.call(model), dense)
        moving = [x for x in model.parameters() if x.requires_grad]
        assert {id(x) for x in handle.parameters()} <= {id(x) for x in moving}
        optimizer = torch.optim.Adam(handle.parameters(), lr=1e-2)
        for _ in range(30):
            optimizer.zero_grad()
            (case.call(model) - dense).square().mean().backward()
            optimizer.step()
        with torch.no_grad():
            after = relative_rms(case.call(model), dense)
        assert after < 0.95 * before
        assert all(x.any() for x in handle.parameters())
