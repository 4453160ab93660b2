"""The methods. A method's module holds all of it: settings, recipe, trainer, registration."""

from importlib import import_module
from pkgutil import iter_modules

from fastcl.train.methods.registry import METHODS

__all__ = ["METHODS", "discover"]


def discover() -> None:
    """Import the modules of this folder, which register their methods."""
    for module in iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")


discover()
