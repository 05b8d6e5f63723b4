"""MoH-ViT against a slow model from the papers, one query at a time, on the authors' names."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F

import vidattn.backbones  # noqa: F401
from tests.backbones.loading import CLASSES, assert_same, load
from tests.backbones.slow_models import conv, draw, layer, linear, norm
from vidattn.backbones.layers.head_routing import HeadRouter, balance_losses

DIM, HEADS, SHARED, ROUTED, STRIDES = 8, (2, 4), (2, 1), (0, 2), (2, 1)
OPTIONS = {
    "embed_dim": DIM,
    "depths": (1, 1),
    "num_heads": HEADS,
    "num_shared": SHARED,
    "num_routed": ROUTED,
    "strides": STRIDES,
    "mlp_ratios": (3, 2),
}


def shapes():
    """Names and shapes of a released MoH-ViT of two stages, the second with full attention."""
    found = {}
    for i, heads in enumerate(HEADS):
        dim = DIM * 2**i
        patches = (dim, 3, 7, 7) if i == 0 else (dim, dim // 2, 3, 3)
        found |= layer(f"patch_embed{i + 1}.proj", *patches) | layer(
            f"patch_embed{i + 1}.norm", dim
        )
        block, hidden = f"block{i + 1}.0", 2 * OPTIONS["mlp_ratios"][i] * dim // 3
        found |= layer(f"{block}.norm1", dim) | layer(f"{block}.norm2", dim)
        attn = f"{block}.attn"
        found |= {f"{attn}.temperature": (heads, 1, 1)}
        found |= {f"{attn}.query_embedding": (heads, 1, dim // heads)}
        found |= layer(f"{attn}.cpb_fc1", 512, 2) | layer(f"{attn}.cpb_fc2", heads, 512)
        found |= layer(f"{attn}.proj", dim, dim)
        if STRIDES[i] == 1:
            found |= layer(f"{attn}.qkv", 3 * dim, dim)
        else:
            found |= layer(f"{attn}.q", dim, dim) | layer(f"{attn}.kv", 2 * dim, dim)
            found |= layer(f"{attn}.sr", dim, dim, 1, 1) | layer(f"{attn}.norm", dim)
            found |= {f"{attn}.relative_pos_bias_local": (heads, 9)}
            found |= {f"{attn}.learnable_tokens": (heads, dim // heads, 9)}
            found |= {f"{attn}.learnable_bias": (heads, 1, 9)}
        if SHARED[i] > 1:
            found |= {f"{attn}.wg_1.weight": (SHARED[i], dim)}
        if ROUTED[i]:
            found |= {f"{attn}.wg.weight": (heads - SHARED[i], dim)}
            found |= {f"{attn}.wg_0.weight": (2, dim)}
        found |= layer(f"{block}.mlp.fc1", 2 * hidden, dim) | layer(f"{block}.mlp.fc2", dim, hidden)
        found |= layer(f"{block}.mlp.dwconv.dwconv", hidden, 1, 3, 3)
        found |= layer(f"norm{i + 1}", dim)
    return found | layer("head", CLASSES, dim)


def bias_of(p, name, offset, side):
    """Biases of all heads for a key so many rows and columns before the query."""
    scaled = [8 * x / (side - 1) for x in offset]
    logs = [math.copysign(math.log2(abs(x) + 1) / 3, x) for x in scaled]
    hidden = linear(p, f"{name}.cpb_fc1", torch.tensor(logs).double()).relu()
    return linear(p, f"{name}.cpb_fc2", hidden)


def head_weights(p, name, x, num_shared, num_routed):
    """Weights of the heads for one token (C,)."""
    shared = torch.ones(num_shared).double()
    if num_shared > 1:
        shared = linear(p, f"{name}.wg_1", x).softmax(0) * num_shared
    if not num_routed:
        return shared
    gates = linear(p, f"{name}.wg", x).softmax(0)
    kept = torch.zeros_like(gates)
    for i in sorted(range(len(gates)), key=lambda i: -gates[i])[:num_routed]:
        kept[i] = gates[i]
    kinds = linear(p, f"{name}.wg_0", x).softmax(0) * 2
    return torch.cat([shared * kinds[0], kept / kept.sum() * num_routed * kinds[1]])


def attention(p, name, x, stage):
    """Attention of one map (H, W, C), whose heads every token weighs."""
    heads, stride, side = HEADS[stage], STRIDES[stage], 56 // 2**stage
    H, W, C = x.shape
    out = torch.empty(H, W, heads, C // heads).double()
    pooled = []
    if stride == 1:
        q, keys, values = linear(p, f"{name}.qkv", x).view(H, W, 3, heads, -1).unbind(2)
    else:
        q = linear(p, f"{name}.q", x).view(H, W, heads, -1)
        keys, values = linear(p, f"{name}.kv", x).view(H, W, 2, heads, -1).unbind(2)
        wide = F.gelu(conv(p, f"{name}.sr", x[None]))[0]
        for i in range(0, H, stride):
            for j in range(0, W, stride):
                mean = wide[i : i + stride, j : j + stride].mean((0, 1))
                k, v = linear(p, f"{name}.kv", norm(p, f"{name}.norm", mean)).view(2, heads, -1)
                pooled.append((i + (stride - 1) / 2, j + (stride - 1) / 2, k, v))
    for i in range(H):
        for j in range(W):
            query = F.normalize(q[i, j], dim=-1)
            moved = query + p[f"{name}.query_embedding"][:, 0]
            moved = moved * F.softplus(p[f"{name}.temperature"][:, 0])
            near = [(y, z) for y in (i - 1, i, i + 1) for z in (j - 1, j, j + 1)]
            near = [(c, y, z) for c, (y, z) in enumerate(near) if 0 <= y < H and 0 <= z < W]
            read, bias, extra = [], [], []
            if stride == 1:
                far = [(y, z, keys[y, z], values[y, z]) for y in range(H) for z in range(W)]
            else:
                far = pooled
                tokens = torch.einsum("hd,hdl->hl", query, p[f"{name}.learnable_tokens"])
                tokens = tokens + p[f"{name}.learnable_bias"][:, 0]
                for c, y, z in near:
                    read.append((keys[y, z], values[y, z]))
                    bias.append(p[f"{name}.relative_pos_bias_local"][:, c])
                    extra.append(tokens[:, c])
            for y, z, k, v in far:
                read.append((k, v))
                bias.append(bias_of(p, name, (i - y, j - z), side))
                extra.append(torch.zeros(heads).double())
            scores = [
                (F.normalize(k, dim=-1) * moved).sum(-1) * math.log(len(read)) for k, _ in read
            ]
            weights = (torch.stack(scores) + torch.stack(bias)).softmax(0) + torch.stack(extra)
            out[i, j] = sum(w[:, None] * v for w, (_, v) in zip(weights, read))
            out[i, j] *= head_weights(p, name, x[i, j], SHARED[stage], ROUTED[stage])[:, None]
    return linear(p, f"{name}.proj", out.flatten(2))


def slow_moh(state, images):
    p = {name: x.double() for name, x in state.items()}
    x = images.double().permute(0, 2, 3, 1)
    for i in range(len(HEADS)):
        options = {"stride": 4, "padding": 3} if i == 0 else {"stride": 2, "padding": 1}
        x = conv(p, f"patch_embed{i + 1}.proj", x, **options)
        x = norm(p, f"patch_embed{i + 1}.norm", x)
        block = f"block{i + 1}.0"
        y = norm(p, f"{block}.norm1", x, 1e-6)
        x = x + torch.stack([attention(p, f"{block}.attn", each, i) for each in y])
        gate, y = linear(p, f"{block}.mlp.fc1", norm(p, f"{block}.norm2", x, 1e-6)).chunk(2, -1)
        gate = conv(p, f"{block}.mlp.dwconv.dwconv", gate, padding=1, groups=gate.shape[-1])
        x = x + linear(p, f"{block}.mlp.fc2", F.gelu(gate) * y)
        x = norm(p, f"norm{i + 1}", x, 1e-6)
    return linear(p, "head", x.mean((1, 2)))


# maps of 4 x 6 and 2 x 3; of 3 x 5, with patches that are not whole, and 2 x 3; of one cell
@pytest.mark.parametrize("size", [(16, 24), (11, 17), (4, 3)])
@torch.no_grad()
def test_released_weights(size, tmp_path):
    state, images = draw(shapes()), torch.randn(2, 3, *size)
    model = load("moh_vit_tiny", {"model": state}, tmp_path, **OPTIONS)
    assert_same(model, images, slow_moh(state, images))


def test_own_weights_load_as_they_are(tmp_path):
    state = timm.create_model("moh_vit_tiny", num_classes=CLASSES, **OPTIONS).state_dict()
    model = load("moh_vit_tiny", state, tmp_path, **OPTIONS)
    assert all(x.equal(state[name].double()) for name, x in model.state_dict().items())


def test_balance_of_heads():
    model = timm.create_model("moh_vit_tiny", **OPTIONS)
    router = model.stages[1].blocks[0].attn.router
    seen = []
    router.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    with balance_losses(model) as losses:
        model(torch.randn(2, 3, 32, 40))
    # the first stage routes nothing
    assert len(losses) == 1
    gates = router.routed(seen[0]).flatten(0, 2).softmax(-1)
    best = gates.topk(2, -1).indices
    taken = [(best == head).any(-1).float().mean() for head in range(3)]
    answer = 3 * sum(gates[:, head].mean() * taken[head] for head in range(3))
    torch.testing.assert_close(losses[0], answer)
    losses[0].backward()
    assert router.routed.weight.grad.any()
    model(torch.randn(1, 3, 32, 32))
    assert len(losses) == 1


@pytest.mark.parametrize("inside", [True, False])
def test_balance_with_checkpointing(inside):
    """The backward pass may run inside the ``with`` block or behind it."""
    options = OPTIONS | {"depths": (2, 2), "drop_path_rate": 0.0}
    model, images = timm.create_model("moh_vit_tiny", **options), torch.randn(2, 3, 32, 40)

    def gradients():
        model.zero_grad()
        with balance_losses(model) as losses:
            loss = model(images).square().sum()
            if inside:
                (loss + 10 * torch.stack(losses).mean()).backward()
        if not inside:
            (loss + 10 * torch.stack(losses).mean()).backward()
        return losses, {name: x.grad for name, x in model.named_parameters()}

    losses, grads = gradients()
    assert len(losses) == 2
    model.set_grad_checkpointing()
    found, checkpointed = gradients()
    torch.testing.assert_close(found, losses)
    torch.testing.assert_close(checkpointed, grads)


@pytest.mark.parametrize(("num_shared", "num_routed"), [(0, 2), (1, 3), (4, 0)])
@torch.no_grad()
def test_weights_of_heads(num_shared, num_routed):
    router = HeadRouter(8, 4, num_shared=num_shared, num_routed=num_routed)
    weights = router(torch.randn(3, 5, 8) * 20)
    assert weights.shape == (3, 5, 4)
    assert ((weights[..., num_shared:] > 0).sum(-1) == num_routed).all()
    if num_shared == 0 or num_routed == 0:
        # of one kind, weights average 1
        total = torch.full((3, 5), float(num_shared + num_routed))
        torch.testing.assert_close(weights.sum(-1), total)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strides": (8, 4)}, "must have one entry for each stage"),
        ({"num_heads": (5, 6, 12, 24)}, "dim must be a multiple of num_heads, got 72 and 5"),
        ({"num_routed": (0, 0, 10, 12)}, "of 12 heads, 3 cannot be shared and 10 routed"),
        ({"num_routed": (1, 0, 6, 12)}, "of 3 heads, 3 cannot be shared and 1 routed"),
        ({"num_routed": (0, 0, 0, 12)}, "of 12 heads, 3 cannot be shared and 0 routed"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("moh_vit_tiny", device="meta", **options)
