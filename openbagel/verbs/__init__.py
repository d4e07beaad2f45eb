"""The verbs of the command line: `openbagel generate` and all others.

Every verb is a frozen dataclass: its fields are its arguments, its docstring is its help, its `run` does the
work and returns an exit code other than 0 if it has one. Only the module of the verb that is asked for is
imported.
"""

from importlib import import_module
from typing import Any

MODULES = {
    "use": ("generate", "ask", "edit", "video", "demo"),
    "serving": ("serve", "ui"),
    "training": ("train", "train plot", "data doctor", "data convert", "data example"),
    "scores": ("eval", "eval report", "eval curve"),
    "models": ("info", "convert", "download", "doctor"),
}
VERBS = {verb: module for module, verbs in MODULES.items() for verb in verbs}
"""Where each verb is."""


def verb_of(name: str) -> Any:
    """The dataclass of a verb: "eval report" is `EvalReport`."""
    return getattr(import_module(f"openbagel.verbs.{VERBS[name]}"), name.title().replace(" ", ""))
