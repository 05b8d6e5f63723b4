"""The backbones once more, from the papers and released code: slow, in float64, on authors' names.

A model is a function of a state dict as the authors release it. Attention goes cell by cell.
"""

import torch
import torch.nn.functional as F


def draw(shapes):
    """A state dict of random tensors, scaled so that activations keep their size."""
    state = {}
    for name, shape in shapes.items():
        if name.endswith("running_var"):
            state[name] = torch.rand(shape) + 0.5
        elif name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(3)
        else:
            fan_in = max(1, torch.Size(shape[1:]).numel()) if len(shape) > 1 else 4
            state[name] = torch.randn(shape) / fan_in**0.5
    return state


def layer(name, *shape):
    """Weight and bias of one layer."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def linear(p, name, x):
    return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))


def conv(p, name, x, **options):
    """A convolution of (B, H, W, C)."""
    x = F.conv2d(x.permute(0, 3, 1, 2), p[f"{name}.weight"], p.get(f"{name}.bias"), **options)
    return x.permute(0, 2, 3, 1)


def norm(p, name, x, eps=1e-5):
    return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], eps)


def neighborhood_shapes(family, *, dim, depths, heads, window, mlp, classes, scales=False):
    """Names and shapes of a released NAT ("nat"), DiNAT_s ("dinat_s") or isotropic ("iso")."""
    shapes = layer("norm", dim * 2 ** (len(depths) - 1))
    if family == "nat":
        shapes |= layer("patch_embed.proj.0", dim // 2, 3, 3, 3)
        shapes |= layer("patch_embed.proj.1", dim, dim // 2, 3, 3)
    else:
        edge = 16 if family == "iso" else 4
        shapes |= layer("patch_embed.proj", dim, 3, edge, edge)
    shapes |= layer("patch_embed.norm", dim)
    for i, depth in enumerate(depths):
        level = {"nat": f"levels.{i}.", "dinat_s": f"layers.{i}.", "iso": ""}[family]
        for j in range(depth):
            block = f"layers.{j}." if family == "iso" else f"{level}blocks.{j}."
            shapes |= layer(f"{block}norm1", dim) | layer(f"{block}norm2", dim)
            shapes |= layer(f"{block}attn.qkv", 3 * dim, dim) | layer(f"{block}attn.proj", dim, dim)
            shapes[f"{block}attn.rpb"] = (heads[i], 2 * window - 1, 2 * window - 1)
            hidden = int(dim * mlp)
            shapes |= layer(f"{block}mlp.fc1", hidden, dim) | layer(f"{block}mlp.fc2", dim, hidden)
            if scales:
                shapes |= {f"{block}gamma1": (dim,), f"{block}gamma2": (dim,)}
        if i < len(depths) - 1:
            if family == "nat":
                shapes[f"{level}downsample.reduction.weight"] = (2 * dim, dim, 3, 3)
                shapes |= layer(f"{level}downsample.norm", 2 * dim)
            else:
                shapes[f"{level}downsample.reduction.weight"] = (2 * dim, 4 * dim)
                shapes |= layer(f"{level}downsample.norm", 4 * dim)
            dim *= 2
    return shapes | layer("head", classes, dim)


def window_of(x, extent, window, dilation):
    """Positions that position ``x`` of an axis reads."""
    group = list(range(x % dilation, extent, dilation))
    start = min(max(x // dilation - window // 2, 0), len(group) - window)
    return group[start : start + window]


def neighborhood(p, name, x, heads, window, dilation):
    """Neighborhood attention of (B, H, W, C); maps smaller than a window are padded."""
    height, width = x.shape[1:3]
    least = window * dilation
    x = F.pad(x, (0, 0, 0, max(0, least - width), 0, max(0, least - height)))
    B, H, W, C = x.shape
    q, k, v = linear(p, f"{name}.qkv", x).view(B, H, W, 3, heads, -1).unbind(3)
    out = torch.empty_like(q)
    for i in range(height):
        rows = torch.tensor(window_of(i, H, window, dilation))
        for j in range(width):
            columns = torch.tensor(window_of(j, W, window, dilation))
            near = (slice(None), rows[:, None], columns)
            scores = torch.einsum("bhd,brchd->bhrc", q[:, i, j], k[near]) * q.shape[-1] ** -0.5
            places = [(x - y) // dilation + window - 1 for x, y in ((rows, i), (columns, j))]
            scores += p[f"{name}.rpb"][:, places[0][:, None], places[1]]
            weights = scores.flatten(2).softmax(-1).view_as(scores)
            out[:, i, j] = torch.einsum("bhrc,brchd->bhd", weights, v[near])
    return linear(p, f"{name}.proj", out[:, :height, :width].flatten(3))


def full_with_bias(p, name, x, heads):
    """Full attention of (B, H, W, C) with the bias table read as in the isotropic ViT."""
    B, H, W, C = x.shape
    q, k, v = linear(p, f"{name}.qkv", x).view(B, H * W, 3, heads, -1).permute(2, 0, 3, 1, 4)
    places = torch.cartesian_prod(torch.arange(H), torch.arange(W))
    apart = places[:, None] - places + torch.tensor([H - 1, W - 1])
    index = torch.flipud(torch.fliplr(apart[..., 0] * (2 * H - 1) + apart[..., 1]))
    bias = p[f"{name}.rpb"].flatten(1)[:, index]
    weights = (q @ k.mT * q.shape[-1] ** -0.5 + bias).softmax(-1)
    return linear(p, f"{name}.proj", (weights @ v).transpose(1, 2).reshape(x.shape))


def merge_patches(p, name, x):
    """The layer between two stages of Swin."""
    x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
    corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
    return linear(p, f"{name}.reduction", norm(p, f"{name}.norm", torch.cat(corners, -1)))


def slow_neighborhood(state, images, family, *, depths, heads, window, dilations):
    """Class scores by a released NAT, DiNAT_s or isotropic model; a window of None is full."""
    p = {name: x.double() for name, x in state.items()}
    x = images.double().permute(0, 2, 3, 1)
    if family == "nat":
        for i in (0, 1):
            x = conv(p, f"patch_embed.proj.{i}", x, stride=2, padding=1)
    else:
        edge = 16 if family == "iso" else 4
        x = F.pad(x, (0, 0, 0, -x.shape[2] % edge, 0, -x.shape[1] % edge))
        x = conv(p, "patch_embed.proj", x, stride=edge)
    x = norm(p, "patch_embed.norm", x)
    for i, depth in enumerate(depths):
        level = {"nat": f"levels.{i}.", "dinat_s": f"layers.{i}.", "iso": ""}[family]
        for j in range(depth):
            block = f"layers.{j}." if family == "iso" else f"{level}blocks.{j}."
            dilation = dilations[i] if j % 2 else 1
            y = norm(p, f"{block}norm1", x)
            if window is None:
                y = full_with_bias(p, f"{block}attn", y, heads[i])
            else:
                y = neighborhood(p, f"{block}attn", y, heads[i], window, dilation)
            x = x + p.get(f"{block}gamma1", 1) * y
            y = F.gelu(linear(p, f"{block}mlp.fc1", norm(p, f"{block}norm2", x)))
            x = x + p.get(f"{block}gamma2", 1) * linear(p, f"{block}mlp.fc2", y)
        if i < len(depths) - 1:
            down = f"{level}downsample"
            if family == "nat":
                x = conv(p, f"{down}.reduction", x, stride=2, padding=1)
                x = norm(p, f"{down}.norm", x)
            else:
                x = merge_patches(p, down, x)
    return linear(p, "head", norm(p, "norm", x).mean((1, 2)))


def batch_norm_shapes(name, dim):
    statistics = {f"{name}.running_mean": (dim,), f"{name}.running_var": (dim,)}
    return layer(name, dim) | statistics | {f"{name}.num_batches_tracked": ()}


def biformer_shapes(*, dim, depths, mlp, classes, stl):
    """Names and shapes of a released BiFormer, or BiFormer-STL."""
    stem = "downsample_layers.0"
    if stl:
        shapes = layer(f"{stem}.0", dim, 3, 4, 4) | batch_norm_shapes(f"{stem}.1", dim)
    else:
        shapes = layer(f"{stem}.0", dim // 2, 3, 3, 3) | batch_norm_shapes(f"{stem}.1", dim // 2)
        shapes |= layer(f"{stem}.3", dim, dim // 2, 3, 3) | batch_norm_shapes(f"{stem}.4", dim)
    for i, depth in enumerate(depths):
        if i:
            down = f"downsample_layers.{i}"
            edge, places = (2, (1, 0)) if stl else (3, (0, 1))
            shapes |= layer(f"{down}.{places[0]}", 2 * dim, dim, edge, edge)
            shapes |= batch_norm_shapes(f"{down}.{places[1]}", dim if stl else 2 * dim)
            dim *= 2
        for j in range(depth):
            block = f"stages.{i}.blocks.{j}." if stl else f"stages.{i}.{j}."
            if not stl:
                shapes |= layer(f"{block}pos_embed", dim, 1, 3, 3)
            shapes |= layer(f"{block}norm1", dim) | layer(f"{block}norm2", dim)
            shapes |= layer(f"{block}attn.lepe", dim, 1, 5, 5)
            if i < len(depths) - 1:
                shapes |= layer(f"{block}attn.qkv.qkv", 3 * dim, dim)
                shapes |= layer(f"{block}attn.wo", dim, dim)
            else:
                shapes[f"{block}attn.qkv.weight"] = (3 * dim, dim)
                shapes |= layer(f"{block}attn.proj", dim, dim)
            shapes |= layer(f"{block}mlp.0", int(dim * mlp), dim)
            shapes |= layer(f"{block}mlp.{2 if stl else 3}", dim, int(dim * mlp))
    return shapes | batch_norm_shapes("norm", dim) | layer("head", classes, dim)


def batch_norm(p, name, x):
    """In evaluation, of (B, H, W, C)."""
    mean, var = p[f"{name}.running_mean"], p[f"{name}.running_var"]
    return (x - mean) / (var + 1e-5).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]


def bilevel(p, name, x, heads, topk, side=7):
    """Bi-level routing attention of (B, H, W, C), one region of one sample at a time."""
    height, width = x.shape[1:3]
    x = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
    B, H, W, C = x.shape
    q, k, v = linear(p, f"{name}.qkv.qkv", x).chunk(3, -1)
    positional = conv(p, f"{name}.lepe", v, padding=2, groups=C)
    h, w = H // side, W // side
    regions = [
        (slice(i * h, i * h + h), slice(j * w, j * w + w)) for i in range(side) for j in range(side)
    ]
    out = torch.empty_like(v)

    def split(cells):
        return cells.reshape(-1, heads, C // heads).transpose(0, 1)

    for b in range(B):
        keys = torch.stack([k[b][region].mean((0, 1)) for region in regions])
        for region in regions:
            fit = keys @ q[b][region].mean((0, 1))
            chosen = fit.topk(topk).indices
            near_k = torch.cat([k[b][regions[i]].reshape(-1, C) for i in chosen])
            near_v = torch.cat([v[b][regions[i]].reshape(-1, C) for i in chosen])
            weights = (split(q[b][region]) @ split(near_k).mT * C**-0.5).softmax(-1)
            found = (weights @ split(near_v)).transpose(0, 1)
            out[b][region] = found.reshape(h, w, C)
    return linear(p, f"{name}.wo", out + positional)[:, :height, :width]


def slow_biformer(state, images, *, depths, topks, head_dim, stl):
    """Class scores by a released BiFormer, or BiFormer-STL."""
    p = {name: x.double() for name, x in state.items()}
    x, stem = images.double().permute(0, 2, 3, 1), "downsample_layers.0"
    if stl:
        x = batch_norm(p, f"{stem}.1", conv(p, f"{stem}.0", x, stride=4))
    else:
        x = batch_norm(p, f"{stem}.1", conv(p, f"{stem}.0", x, stride=2, padding=1))
        x = conv(p, f"{stem}.3", F.gelu(x), stride=2, padding=1)
        x = batch_norm(p, f"{stem}.4", x)
    for i, depth in enumerate(depths):
        down = f"downsample_layers.{i}"
        if i and stl:
            x = conv(p, f"{down}.1", batch_norm(p, f"{down}.0", x), stride=2)
        elif i:
            x = batch_norm(p, f"{down}.1", conv(p, f"{down}.0", x, stride=2, padding=1))
        C = x.shape[-1]
        for j in range(depth):
            block = f"stages.{i}.blocks.{j}." if stl else f"stages.{i}.{j}."
            if not stl:
                x = x + conv(p, f"{block}pos_embed", x, padding=1, groups=C)
            y = norm(p, f"{block}norm1", x, 1e-6)
            if topks[i] is None:
                y = full_with_convolution(p, f"{block}attn", y)
            else:
                y = bilevel(p, f"{block}attn", y, C // head_dim, topks[i])
            x = x + y
            y = F.gelu(linear(p, f"{block}mlp.0", norm(p, f"{block}norm2", x, 1e-6)))
            x = x + linear(p, f"{block}mlp.{2 if stl else 3}", y)
    return linear(p, "head", batch_norm(p, "norm", x).mean((1, 2)))


def full_with_convolution(p, name, x, heads=8):
    """The attention of the last stage of BiFormer."""
    B, H, W, C = x.shape
    q, k, v = linear(p, f"{name}.qkv", x).view(B, H * W, 3, heads, -1).permute(2, 0, 3, 1, 4)
    weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    out = (weights @ v).transpose(1, 2).reshape(x.shape)
    return linear(p, f"{name}.proj", out + conv(p, f"{name}.lepe", x, padding=2, groups=C))
