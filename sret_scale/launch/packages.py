"""Lists the installed packages that a rank needs, `python -m sret_scale.launch.packages`: for a copy of them.

What it imports when it begins, and what those packages require, since some of them are imported only in the first step.
"""

import importlib
import json
import re
import sys
from importlib import metadata

_STARTED = ("sret_scale.train.main", "data_pipelines.image.torchvision_door")


def normal(name: str) -> str:
    """The name of a package as its installed metadata is called."""
    return re.sub(r"[-_.]+", "_", name).lower()


def required(packages: set[str]) -> set[str]:
    """These packages and all that they require without extras, as far as they are installed."""
    waiting, found = {normal(name) for name in packages}, set[str]()
    while waiting:
        found.add(name := waiting.pop())
        try:
            needs = metadata.requires(name) or ()
        except metadata.PackageNotFoundError:
            # Needed on another system or Python alone.
            continue
        names = (re.match(r"[\w.-]+", need) for need in needs if "extra ==" not in need)
        waiting |= {normal(match[0]) for match in names if match} - found
    return found


def main() -> None:
    """Prints a JSON list: names of modules, and of packages as in their metadata."""
    for module in _STARTED:
        importlib.import_module(module)
    owners = metadata.packages_distributions()
    # DeepSpeed builds its operators by setuptools, which it imports when asked.
    packages = required({"setuptools", *(name for module in list(sys.modules) for name in owners.get(module, ()))})
    modules = {module for module, names in owners.items() if packages & {normal(name) for name in names}}
    print(json.dumps(sorted(modules | packages)))


if __name__ == "__main__":
    main()
