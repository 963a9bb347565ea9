"""Functions of the user's own, named `module:function` in a configuration or on the command line, never in data."""

import difflib
import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def import_of_user(name: str) -> ModuleType:
    """A module that the user named: from where ours are (PYTHONPATH), then from the working folder.

    That folder comes last, and only from here on, so that no file of it takes the place of a library's module.
    """
    if (folder := str(Path.cwd())) not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


def function_of_user(name: str, owner: str) -> Any:
    """The function `module:function` that `owner` asks for; ValueError with what is wrong with the name."""
    module_name, _, function_name = name.partition(":")
    if not function_name:
        raise ValueError(f"{owner}: expected module:function, got {name!r}")
    try:
        module = import_of_user(module_name)
    except ImportError as error:
        where = "expected module:function on PYTHONPATH or in the working folder"
        raise ValueError(f"{owner}: cannot import {module_name}: {error}; {where}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        near = difflib.get_close_matches(function_name, vars(module), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{owner}: {module_name} has no function {function_name!r}{hint}")
    return function
