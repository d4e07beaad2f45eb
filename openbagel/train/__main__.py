"""`python -m openbagel.train …`, for one process or under torchrun.

… RECIPE.yaml [key=value …]      a recipe, as `openbagel train` takes it
… --flag value …                 the official training script's flags
"""

import os
import sys
import warnings
from collections.abc import Sequence

from openbagel.train import official, recipe, stages


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code. What a user got wrong is one line, from the first rank alone."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    warnings.showwarning = lambda message, *_, **__: _say(f"warning: {message}")
    try:
        if given and given[0].endswith((".yaml", ".yml")):
            stages.train(recipe.read_recipe(given[0], given[1:]), _say)
        else:
            stages.train(recipe.recipe_from(official.recipe(given)), _say)
    except (ValueError, OSError) as error:
        _say(f"openbagel.train: {error}")
        return 2
    return 0


def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main())
