"""Optional packages: import one, or say in a sentence which extra has it."""

import importlib
from types import ModuleType

from common import UserError


def require(module: str, extra: str = "desk") -> ModuleType:
    """Import a module of an optional package; raises a UserError that names the extra where it is missing.

    A package that is there but cannot be loaded says why.
    """
    package = module.partition(".")[0]
    advice = f"It is in the extra `{extra}`: make {extra}, or pip install '.[{extra}]'"
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or package).partition(".")[0] == package:
            raise UserError(f"expected the package {package}, found none. {advice}.") from error
        missing = f"expected the package {package}, found one without {error.name}"
        raise UserError(f"{missing}, which it needs. {advice}.") from error
    except (ImportError, OSError) as error:  # a library that does not fit this machine
        raise UserError(f"expected the package {package}, cannot load it ({error}). {advice}.") from error
