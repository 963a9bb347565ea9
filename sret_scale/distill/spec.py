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
    "timm": "timm:NAME[?checkpoint=FILE&size=288&mean=0.5&std=0.5&channels=1]",
    "module": "module:pkg.mod:function",
    "efficientnet-lite0": "efficientnet-lite0",
    "efficientnet-lite1": "efficientnet-lite1",
    "efficientnet-lite2": "efficientnet-lite2",
}
# What the images of a network are, where that is not as it says itself: all kinds of networks take these.
_INPUT = ("size", "mean", "std")
OPTIONS = {kind: _INPUT for kind in FORMS if kind != "labels"} | {"timm": ("checkpoint", "channels", *_INPUT)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherSpec:
    """One teacher: where it comes from, and what was chosen about it."""

    text: str
    kind: str
    value: str
    options: Mapping[str, str]

    def numbers(self, name: str, otherwise: tuple[float, ...]) -> tuple[float, ...]:
        """The numbers of an option, such as `mean=0.5,0.5,0.5`; ValueError for what is none or no such size."""
        text = self.options.get(name)
        if text is None:
            return otherwise
        try:
            found = tuple(map(float, text.split(",")))
        except ValueError:
            found = ()
        is_count = name in ("size", "channels")
        if not found or (is_count and not (len(found) == 1 and found[0] >= 1 and found[0].is_integer())):
            expected = "a whole number" if is_count else "numbers with commas"
            raise ValueError(f"teacher {self.text!r}: {name}: expected {expected}, got {text!r}")
        return found

    @property
    def channels(self) -> int:
        """Of the images that the network takes: 3, or 1 for grey."""
        (count,) = self.numbers("channels", (3,))
        if count not in (1, 3):
            raise ValueError(f"teacher {self.text!r}: channels: expected 1 or 3, got {count:g}")
        return int(count)


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
    named, _, query = text.partition("?")
    kind, colon, value = named.partition(":")
    if kind not in FORMS:
        raise ValueError(
            f"teacher {text!r}: unknown kind {kind!r}{nearest(kind, FORMS)}; forms: {', '.join(FORMS.values())}"
        )
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
