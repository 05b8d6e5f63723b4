"""A pytest plugin that makes timm's own tests/test_models.py test the models of this package.

test_timm_suite.py runs it. Everything is checked on the meta device; what needs numbers, on models
of up to 30 M parameters. Models of videos and scans are left to test_volumes.py: timm's tests give
every model images.
"""

import pkgutil
from functools import cache

import timm

import vidattn.backbones

VOLUMES = {"video_swin", "swift"}
MODULES = sorted(
    {module.name for module in pkgutil.iter_modules(vidattn.backbones.__path__)} - VOLUMES
)
MAX_PARAMETERS = 30_000_000
ON_META = "test_model_default_cfgs"
# these download the released weights
ONLINE = ("test_model_load_pretrained", "test_model_features_pretrained")
_list_models = timm.list_models


def list_models(*args, module="", **options):
    """The models of this package that timm.list_models would list, whatever their module."""
    return [name for own in MODULES for name in _list_models(*args, module=own, **options)]


timm.list_models = list_models


@cache
def is_small(name):
    """Whether there is time to run a model on a CPU."""
    model = timm.create_model(name, device="meta")
    return sum(x.numel() for x in model.parameters()) <= MAX_PARAMETERS


def pytest_collection_modifyitems(config, items):
    """Leave out tests of timm's own models, and numbers of large models."""
    ours = set(list_models(include_tags=True)) | set(list_models())

    def is_wanted(item):
        name = hasattr(item, "callspec") and item.callspec.params.get("model_name")
        if name not in ours or item.originalname in ONLINE:
            return False
        return item.originalname == ON_META or is_small(name)

    config.hook.pytest_deselected(items=[item for item in items if not is_wanted(item)])
    items[:] = [item for item in items if is_wanted(item)]
