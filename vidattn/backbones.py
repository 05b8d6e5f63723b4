"""Vision backbones that timm creates by name, once this is imported.

>>> import timm
>>> import vidattn.backbones
>>> model = timm.create_model("dinat_mini", num_classes=10)

As a program it runs another one, such as those of timm, that then knows these models:
python -m vidattn.backbones train.py --model dinat_mini ...

The modules lie in the folder backbones/, inside vidattn/ in a wheel and beside it in a checkout.
That folder has no __init__.py, so this module is the package, and says where its modules are.
"""

import pkgutil
import sys
from importlib import import_module
from pathlib import Path

if __name__ == "__main__":
    # as a program this file is no package, so the one of its name is imported beside it
    sys.exit(import_module("vidattn.backbones.program").main())

_HERE = Path(__file__).resolve().parent
_FOLDER = _HERE / "backbones"
__path__ = [str(_FOLDER if _FOLDER.is_dir() else _HERE.parent / "backbones")]

# a module registers its models when it is first imported
for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

from vidattn.backbones.faster_windows import accelerate  # noqa: E402

__all__ = ["accelerate"]
