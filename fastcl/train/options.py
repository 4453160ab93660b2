"""The options of ``fastcl train METHOD`` on the command line and in YAML files."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, get_args, get_type_hints

import jsonargparse
import yaml

from fastcl.train.data.choice import kind
from fastcl.train.methods import METHODS
from fastcl.train.settings import KINDS, Settings

# the name in --batch_size or --batch_size=64, as YAML and Python spell --batch-size
_OPTION = re.compile(r"(?<=^--)[^=]+")


def parse(method: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The options of ``method`` that ``arguments`` give, with the recipe's defaults for the others.

    Raises:
        argparse.ArgumentError, ValueError: an unknown option, or a value it cannot have.
        SystemExit: after --help.
    """
    arguments = [_OPTION.sub(lambda option: option[0].replace("_", "-"), text) for text in arguments]
    if "--resume" in arguments:
        arguments[arguments.index("--resume")] = "--resume=true"
    parser = _parser(method, kind(_data(arguments)))
    options = parser.parse_args(arguments)
    return {field.name: _plain(options[field.name]) for field in fields(METHODS[method].settings)}


def _plain(value: Any) -> Any:
    """Without jsonargparse's types of restricted numbers, which neither YAML nor a checkpoint takes."""
    return next((plain(value) for plain in (bool, int, float) if isinstance(value, plain)), value)


def _data(arguments: Sequence[str]) -> str:
    """What --data is, on the command line or in the file: the other defaults depend on it."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--data")
    parser.add_argument("--config")
    known, _ = parser.parse_known_args(arguments)
    if known.data is None and known.config is not None:
        try:
            with open(known.config) as file:
                content = yaml.safe_load(file)
        except (OSError, yaml.YAMLError) as error:
            raise ValueError(f"config must be a YAML file, got {known.config}: {error}") from error
        known.data = content.get("data") if isinstance(content, dict) else None
    return str(known.data or Settings.data)


def _parser(method: str, kind_of_data: str) -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        f"fastcl train {method}",
        exit_on_error=False,
        description="Writes metrics.csv, TensorBoard's files, curves.png, embedding.png, times.json, "
        f"config.yaml and {method}.ckpt. Defaults are those for --data, here {kind_of_data} images.",
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these options.")
    settings = METHODS[method].settings
    recipes = {of: METHODS[method].defaults(of) for of in KINDS}
    types = get_type_hints(settings, include_extras=True)
    for field in fields(settings):
        values = [recipe[field.name] for recipe in recipes.values()]
        type_, help = get_args(types[field.name])
        if any(value != values[0] for value in values):
            help += f" ({', '.join(f'{of}: {value}' for of, value in zip(KINDS, values, strict=True))})"
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type_,
            default=recipes[kind_of_data][field.name],
            help=help.replace("%", "%%"),
        )
    return parser
