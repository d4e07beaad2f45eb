"""`openbagel <verb>`: parse, build a dataclass of `openbagel.verbs`, let it run.

What a user got wrong (ValueError, or a file that cannot be used) becomes one line and exit code 2.
"""

import argparse
import dataclasses
import sys
import types
import typing
import warnings
from collections.abc import Sequence
from enum import Enum
from typing import Any

import openbagel
from openbagel.checks import nearest
from openbagel.verbs import VERBS, verb_of


class Parser(argparse.ArgumentParser):
    """Errors in one line; an unknown option names the nearest one."""

    def error(self, message: str) -> typing.NoReturn:
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)

    def parse_strictly(self, arguments: Sequence[str]) -> argparse.Namespace:
        parsed, left = self.parse_known_intermixed_args(arguments)
        if left:
            known = [flag for action in self._actions for flag in action.option_strings]
            hint = nearest(left[0].partition("=")[0], known) if left[0].startswith("-") else "; quote texts"
            self.error(f"unknown argument {left[0]!r}{hint}")
        return parsed


def add_fields(parser: argparse.ArgumentParser, verb: type) -> None:
    """An argument for each field of a verb, its type deciding."""
    hints = typing.get_type_hints(verb)
    for f in dataclasses.fields(verb):
        argument = dict(f.metadata)
        short = [argument.pop("short")] if "short" in argument else []
        aliases = argument.pop("aliases", ())
        is_positional = argument.pop("positional", False)
        names = [f.name] if is_positional else [*short, "--" + f.name.replace("_", "-"), *aliases]
        shown = f.default.value if isinstance(f.default, Enum) else f.default
        if shown is not None and shown is not False and not is_positional:
            argument["help"] += f" (default: {shown})"
        parser.add_argument(*names, default=f.default, **_typed(hints[f.name], argument))


def _typed(hint: Any, argument: dict[str, Any]) -> dict[str, Any]:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(kind for kind in typing.get_args(hint) if kind is not type(None))
    if "type" in argument:
        return argument
    if hint is bool:
        return argument | {"action": "store_true"}
    if typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        return argument | {"type": kinds[0], "nargs": len(kinds)}
    if typing.get_origin(hint) is list:
        return argument | {"type": typing.get_args(hint)[0]}
    if issubclass(hint, Enum):
        return argument | {"type": str, "choices": [member.value for member in hint]}
    return argument | {"type": hint}


def parser_for(name: str) -> Parser:
    verb = verb_of(name)
    parser = Parser(prog=f"openbagel {name}", description=verb.__doc__, allow_abbrev=False)
    add_fields(parser, verb)
    return parser


def usage() -> str:
    verbs = "\n".join(f"  {name:<14}{verb_of(name).__doc__}" for name in VERBS)
    return f"usage: openbagel VERB …\n\n{verbs}\n\nopenbagel VERB --help lists a verb's options"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(usage())
        return 0 if given else 2
    if given[0] == "--version":
        print(openbagel.__version__)
        return 0
    words = 2 if " ".join(given[:2]) in VERBS else 1
    name, rest = " ".join(given[:words]), given[words:]
    inner = [verb for verb in VERBS if verb.startswith(name + " ")]
    if name not in VERBS and inner:
        print(
            f"openbagel {name}: say which of {', '.join(inner)}{nearest(' '.join(given[:2]), inner)}",
            file=sys.stderr,
        )
        return 2
    if name not in VERBS:
        print(f"openbagel: unknown verb {name!r}{nearest(name, VERBS)}\n{usage()}", file=sys.stderr)
        return 2
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        parsed = vars(parser_for(name).parse_strictly(rest))
        return verb_of(name)(**parsed).run() or 0
    except BrokenPipeError:  # the reader, such as `head`, has enough: nothing is left to be written at exit
        sys.stdout = None
        return 1
    except (ValueError, OSError) as error:
        print(f"openbagel {name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
