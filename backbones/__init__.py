"""Vision backbones that timm creates by name, once this is imported.

>>> import timm
>>> import vidattn.backbones
>>> model = timm.create_model("dinat_mini", num_classes=10)

As a program it runs another one, such as those of timm, that then knows these models:
python -m vidattn.backbones train.py --model dinat_mini ...
"""

import pkgutil
from importlib import import_module

if __name__ != "vidattn.backbones":
    raise ImportError(f"this folder was imported as {__name__}; import vidattn.backbones")

# a module registers its models when it is first imported
for _module in pkgutil.iter_modules(__path__):
    if _module.name != "__main__":
        import_module(f"{__name__}.{_module.name}")

from vidattn.backbones.faster.windows import accelerate  # noqa: E402

__all__ = ["accelerate"]
