"""The words of `distill.teacher`: `kind:value?option=value`, several joined with `+`."""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

FORMS = {
    "run": "run:FOLDER",
    "labels": "labels:FOLDER",
    "timm": "timm:NAME[?checkpoint=FILE]",
    "module": "module:pkg.mod:function",
    "efficientnet-lite0": "efficientnet-lite0",
    "efficientnet-lite1": "efficientnet-lite1",
    "efficientnet-lite2": "efficientnet-lite2",
}
OPTIONS = {"timm": ("checkpoint",)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherSpec:
    """One teacher: where it comes from, and what was chosen about it."""

    text: str
    kind: str
    value: str
    options: Mapping[str, str]


def parse_teacher(text: str) -> tuple[TeacherSpec, ...]:
    """The teachers that a text names, in its order. A `+` joins only where a kind follows: `run:runs/a+b` is one.

    Raises ValueError with the forms that exist, the nearest one first.
    """
    bare = "|".join(kind for kind, form in FORMS.items() if ":" not in form)
    parts = re.split(rf"\+(?=[A-Za-z0-9-]+:{bare and f'|(?:{bare})(?:[+?]|$)'})", text.strip())
    return tuple(_parse_one(part.strip()) for part in parts)


def stored_labels(text: str | None) -> Path | None:
    """The folder of a `labels:FOLDER` spec; None for any other. ValueError when it is joined with other teachers."""
    parts = parse_teacher(text) if text else ()
    if not any(part.kind == "labels" for part in parts):
        return None
    if len(parts) > 1:
        raise ValueError(f"teacher {text!r}: stored labels cannot be combined; write labels of the combined teachers")
    return Path(parts[0].value)


def _parse_one(text: str) -> TeacherSpec:
    kind, colon, rest = text.partition(":")
    if kind not in FORMS:
        raise ValueError(f"teacher {text!r}: unknown kind {kind!r}{nearest(kind, FORMS)}; forms: {_forms()}")
    value, _, query = rest.partition("?")
    if bool(colon) != (":" in FORMS[kind]) or (colon and not value):
        raise ValueError(f"teacher {text!r}: expected {FORMS[kind]}")
    options = {}
    for item in filter(None, query.split("&")):
        name, equals, option = item.partition("=")
        known = OPTIONS.get(kind, ())
        if name not in known or not equals or not option:
            raise ValueError(f"teacher {text!r}: unknown or empty option {item!r}{nearest(name, known)}")
        options[name] = option
    return TeacherSpec(text=text, kind=kind, value=value, options=MappingProxyType(options))


def nearest(name: str, choices: Iterable[str]) -> str:
    """`; did you mean A or B?` for a name that is not among the choices, or nothing when none is near."""
    found = difflib.get_close_matches(name, list(choices), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def _forms() -> str:
    return ", ".join(FORMS.values())
