"""The options of ``fastcl train METHOD`` on the command line and in YAML files."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, get_type_hints

import yaml

from fastcl.train.data.choice import kind
from fastcl.train.methods import METHODS
from fastcl.train.ranges import described, is_flag

# the name in --batch_size or --batch_size=64, as YAML and Python spell --batch-size
_OPTION = re.compile(r"(?<=^--)[^=]+")


def parse(method: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The options of ``method`` that ``arguments`` give, or the file that they name.

    Raises:
        argparse.ArgumentError, ValueError: an unknown option, or one without its value.
        SystemExit: after --help.
    """
    arguments = [_OPTION.sub(lambda option: option[0].replace("_", "-"), text) for text in arguments]
    options = _from_file(method, arguments)
    data = _first(arguments, "data") or options.get("data") or METHODS[method].data
    given, unknown = _parser(method, kind(str(data))).parse_known_args(arguments)
    if unknown:
        raise ValueError(f"unrecognized arguments: {' '.join(unknown)}")
    options.update(vars(given))
    options.pop("config", None)
    return options


def _first(arguments: Sequence[str], name: str) -> str | None:
    """The value of one option, which the others' defaults depend on."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    parser.add_argument(f"--{name}")
    value: str | None = getattr(parser.parse_known_args(arguments)[0], name)
    return value


def _from_file(method: str, arguments: Sequence[str]) -> dict[str, Any]:
    config = _first(arguments, "config")
    if config is None:
        return {}
    try:
        with open(config) as file:
            content = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"config must be a YAML file, got {config}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"config must be a YAML file of options, got {config}")
    known = {field.name for field in fields(METHODS[method].settings)}
    unknown = [str(name) for name in content if name not in known]
    if unknown:
        raise ValueError(f"config must hold options of {method}, got {unknown[0]!r} in {config}")
    return content


def _parser(method: str, kind_of_data: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        f"fastcl train {method}",
        exit_on_error=False,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        description=f"{METHODS[method].summary}. Writes metrics.csv, TensorBoard's files, curves.png, more "
        f"pictures, times.json, config.yaml and {method}.ckpt. Defaults are those for --data, here "
        f"{kind_of_data}.",
    )
    parser.add_argument("--config", help="YAML file with any of these options.")
    settings = METHODS[method].settings
    defaults = METHODS[method].defaults(kind_of_data)
    recipes = {of: METHODS[method].defaults(of) for of in settings.kinds}
    types = get_type_hints(settings, include_extras=True)
    for field in fields(settings):
        values = [_shown(recipe[field.name]) for recipe in recipes.values()]
        help = described(types[field.name])
        if any(value != values[0] for value in values):
            help += f" ({', '.join(f'{of}: {value}' for of, value in zip(recipes, values, strict=True))})"
        help += f" (default: {_shown(defaults[field.name])})"
        flag: dict[str, Any] = {"nargs": "?", "const": True} if is_flag(types[field.name]) else {}
        name = field.name.replace("_", "-")
        parser.add_argument(f"--{name}", metavar=name.upper(), help=help.replace("%", "%%"), **flag)
    return parser


def _shown(value: object) -> str:
    """As it is typed."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
