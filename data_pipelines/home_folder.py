"""The home folder: for `~` in what a user wrote, where no shell has replaced it, and for caches."""

import re
from pathlib import Path


def with_home(text: str) -> str:
    """`text` with the folder for each `~/` or `~NAME/` that begins a path: at its start, or behind `=`, `:`, `+`, `,`.

    Raises ValueError where the folder is not known, as in a container without HOME and without a name for its user.
    """
    return text if "://" in text else re.sub(r"(?<![^=:+,])~[\w.-]*(?=/)", lambda found: _home(found[0]), text)


def _home(name: str) -> str:
    try:
        return str(Path(name).expanduser())
    except RuntimeError as error:
        raise ValueError(
            f"{name} stands for a home folder that is not known here: set HOME, or write the whole path"
        ) from error
