"""Graphs of models stand without this package and compute what the models do, at any size."""

import onnxruntime
import pytest
import timm
import torch

import vidattn.backbones  # noqa: F401

NEIGHBORHOOD = {"embed_dim": 8, "depths": (2,), "num_heads": (2,), "window": 5, "dilations": (2,)}
# options, and the size of the images of which graphs are made
MODELS = {
    "dinat_mini": (NEIGHBORHOOD, (40, 48)),
    "vitrpb_small": ({"embed_dim": 8, "num_heads": 2, "depth": 1}, (112, 240)),
    "biformer_tiny": ({"embed_dim": 32, "depths": (1, 1), "topks": (4, None)}, (60, 64)),
    "inline_swin_tiny": (
        {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "are_linear": (True, False)}
        | {"window": 3},
        (32, 48),
    ),
    "moh_vit_tiny": (
        {"embed_dim": 8, "depths": (1, 1), "num_heads": (2, 4), "num_shared": (2, 1)}
        | {"num_routed": (0, 2), "strides": (2, 1), "mlp_ratios": (2, 2)},
        (32, 48),
    ),
}
OWN_OPERATORS = ("dinat_mini", "vitrpb_small", "biformer_tiny")
DYNAMIC = {axis: torch.export.Dim.DYNAMIC for axis in (0, 2, 3)}


def create(name):
    options, size = MODELS[name]
    model = timm.create_model(name, num_classes=4, **options).eval()
    for key, x in model.named_parameters():
        if key.endswith("rpb"):
            torch.nn.init.normal_(x)
    return model, torch.randn(2, 3, *size)


def assert_same(graph, model, *sizes):
    """A graph gives what the model gives for other batches and sizes."""
    for batch, size in enumerate(sizes, start=2):
        images = torch.randn(batch, 3, *size)
        torch.testing.assert_close(graph(images), model(images))


@pytest.mark.parametrize("name", OWN_OPERATORS)
@torch.no_grad()
def test_a_trace_takes_other_batches(name):
    model, images = create(name)
    size = tuple(images.shape[2:])
    assert_same(torch.jit.trace(model, images), model, size, size)


@pytest.mark.parametrize("name", OWN_OPERATORS)
@torch.no_grad()
def test_an_exported_program_takes_other_batches_and_sizes(name):
    model, images = create(name)
    program = torch.export.export(model, (images,), dynamic_shapes=(DYNAMIC,))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [target for target in called if target.startswith("vidattn")]
    # smaller than a window, for the model that pads, and larger
    assert_same(program.module(), model, MODELS[name][1], (97, 161), (224, 224))


@torch.no_grad()
def test_compiled_as_one_graph():
    model, images = create("biformer_tiny")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), model(images))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_onnx(name, tmp_path):
    model, images = create(name)
    torch.onnx.export(model, (images,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(images))
