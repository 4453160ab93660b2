"""Which methods there are: their modules add them here; command line, options and runs read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, TypeVar

from fastcl.train.methods.base import Method
from fastcl.train.settings import KINDS, RunSettings, Settings

Recipe = Mapping[str, Mapping[str, Any]]
_Trainer = TypeVar("_Trainer", bound=type[Method])


@dataclass(frozen=True, eq=False)
class Registration:
    """A method as ``fastcl train`` offers it.

    Attributes:
        name: on the command line and of the checkpoint's file.
        summary: one line for the help, with the paper.
        trainer: what is trained; its arguments are ``dim``, ``optimization`` and the options
            that ``settings`` adds to those of all methods for its kinds of data.
        settings: its options, and the kinds of data that it is for.
        recipe: by kind of data, the defaults that differ from those of the kind and of ``settings``.

    Raises:
        ValueError: a recipe that leaves an option without a default, or gives one to what is no option.
    """

    name: str
    summary: str
    trainer: type[Method]
    settings: type[RunSettings]
    recipe: Recipe

    def __post_init__(self) -> None:
        kinds = self.settings.kinds
        if set(self.recipe) != set(kinds):
            raise ValueError(f"recipe must be for {', '.join(kinds)}, got {', '.join(self.recipe)}")
        options = {option.name for option in fields(self.settings)}
        for kind in kinds:
            given = set(self.defaults(kind))
            if options != given:
                lacking, unknown = sorted(options - given), sorted(given - options)
                raise ValueError(
                    f"recipe for {kind} must give every option, lacks {lacking}, unknown {unknown}"
                )

    @property
    def data(self) -> str:
        """The default of the option ``data``."""
        return next(str(option.default) for option in fields(self.settings) if option.name == "data")

    def defaults(self, kind: str) -> dict[str, Any]:
        """The default of every option on data of ``kind``, one of the settings' ``kinds``.

        Raises:
            ValueError: the method is not for such data.
        """
        if kind not in self.settings.kinds:
            raise ValueError(f"data must be {' or '.join(self.settings.kinds)} for {self.name}, got {kind}")
        own = {
            option.name: option.default for option in fields(self.settings) if option.default is not MISSING
        }
        known = {option.name for option in fields(self.settings)}
        of_kind = {name: value for name, value in KINDS[kind].items() if name in known}
        return {**own, **of_kind, **self.recipe[kind]}


METHODS: dict[str, Registration] = {}


def register(
    name: str, summary: str, *, settings: type[RunSettings] = Settings, recipe: Recipe
) -> Callable[[_Trainer], _Trainer]:
    """Make the decorated trainer the method ``name``; the arguments are :class:`Registration`'s.

    Raises:
        ValueError: a name that is taken, or as :class:`Registration`.
    """

    def decorate(trainer: _Trainer) -> _Trainer:
        if name in METHODS:
            raise ValueError(f"name must be new, {name} is {METHODS[name].trainer.__name__}")
        METHODS[name] = Registration(name, summary, trainer, settings, recipe)
        return trainer

    return decorate
