"""openbagel: one model that looks at pictures, draws, edits, thinks and continues videos.

The public names are imported when they are first used, so that `import openbagel` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from openbagel.config import Sampling
    from openbagel.flow import Guidance
    from openbagel.inference.pipeline import Bagel

__version__ = "0.1.0"
__all__ = ["Bagel", "Guidance", "Sampling", "__version__"]

_HOMES = {
    "Bagel": "openbagel.inference.pipeline",
    "Guidance": "openbagel.flow",
    "Sampling": "openbagel.config",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'openbagel' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
