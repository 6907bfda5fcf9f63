"""Namespaces whose names are imported when they are first used, so that importing a package costs nothing (PEP 562)."""

from collections.abc import Callable, Mapping
from importlib import import_module


def lazy(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Returns a package's `__getattr__` and `__dir__`.

    Args:
        package: its name.
        homes: public name -> the module that defines it; a public name that is a module or package of its own has that.
    """

    def get(name: str) -> object:
        """Imports the module of a public name when the name is first used."""
        if name not in homes:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        module = import_module(homes[name])
        value = module if homes[name] == f"{package}.{name}" else getattr(module, name)
        import_module(package).__dict__[name] = value
        return value

    return get, lambda: sorted(homes)
