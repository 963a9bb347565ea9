"""The fields of a configuration: their names, types, defaults and meanings, and the one that somebody had in mind."""

import ast
import dataclasses
import difflib
import inspect
import itertools
import json
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

# What other trainers call a field -> what to type here; {} is the value that was typed.
COMMON_NAMES = {
    "lr": "optim.learning_rate={}",
    "wd": "optim.weight_decay={}",
    "epochs": "train.total_images={}ep",
    "warmup_epochs": "optim.warmup_images={}ep",
    "batch_size": "train.global_batch_size={}",
    "img_size": "model.image_size={}",
    "alpha": "distill.hard_weight (1 - alpha of DeiT), or augment.mixup_alpha={}",
    "mixup": "augment.mixup_alpha={}",
}


@dataclass(frozen=True, kw_only=True)
class Field:
    """One setting. `name` has dots, with N for the number of an item; `default` is None where there is none."""

    name: str
    kind: str
    default: str | None
    meaning: str


def fields_of(kind: type[Any], prefix: str = "") -> Iterator[Field]:
    """Every single value below a dataclass, in order."""
    hints, meanings = typing.get_type_hints(kind), _meanings(kind)
    for entry in dataclasses.fields(kind):
        if not entry.init:
            continue
        hint, name = hints[entry.name], f"{prefix}{entry.name}"
        item = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else None
        if found := kinds_of(hint):
            # Kinds of one section share fields.
            every = {field.name: field for one in reversed(found) for field in fields_of(one, f"{name}.")}
            yield from every.values()
        elif dataclasses.is_dataclass(item):
            yield from fields_of(typing.cast(type[Any], item), f"{name}.N.")
        else:
            default = None if entry.default is dataclasses.MISSING else json.dumps(entry.default)
            yield Field(name=name, kind=_in_words(hint), default=default, meaning=meanings.get(entry.name, ""))


def kinds_of(hint: Any) -> list[type[Any]]:
    """The dataclasses that a value of this type may be."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    return [typing.cast(type[Any], option) for option in options if dataclasses.is_dataclass(option)]


def _in_words(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(_in_words, arguments))
    if origin is tuple:
        return f"list of {'any number of ' if arguments[-1] is Ellipsis else ''}{_in_words(arguments[0])}"
    return "null" if kind is types.NoneType else str(kind.__name__)


def _meanings(kind: type[Any]) -> dict[str, str]:
    """Field -> the text below it, or what stands behind its name in an entry of the class's docstring."""
    inherited = _meanings(kind.__base__) if dataclasses.is_dataclass(kind.__base__) else {}
    entries = re.findall(r"^(\w+(?:, \w+)*): (.+(?:\n +.+)*)", inspect.getdoc(kind) or "", re.MULTILINE)
    found = inherited | {name: text for names, text in entries for name in names.split(", ")}
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    for field, text in itertools.pairwise(definition.body):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(meaning))):
                found[name] = meaning
    return {name: " ".join(text.split()) for name, text in found.items()}


def suggestion(key: str, value: object, names: Sequence[str], valid: Sequence[str]) -> str:
    """A hint for a field that is not there: what others call so, or the nearest of `names`, else what is `valid`.

    names: all fields with their sections; valid: what can stand at the place of the mistake.
    """
    leaf = key.rpartition(".")[2]
    if leaf in COMMON_NAMES:
        return f"did you mean {COMMON_NAMES[leaf].format(value)}?"
    shown = {name.replace(".stages.N.", "."): name.rpartition(".")[2] for name in names}
    # Of several sections with such a field, the first.
    near = [name for name, last in shown.items() if last == leaf]
    near = near or difflib.get_close_matches(key, shown, n=1, cutoff=0.75)
    leaves = difflib.get_close_matches(leaf, shown.values(), n=1)
    near = near or [name for name, last in shown.items() if last in leaves]
    return f"did you mean {near[0]!r}?" if near else f"valid names: {', '.join(valid)}"


def page(kind: type[Any], section: str | None = None) -> str:
    """All settings below a configuration's dataclass, or those of a section, as Markdown; ValueError for another."""
    sections = typing.get_type_hints(kind)
    if section is not None and section not in sections:
        near = difflib.get_close_matches(section, sections, n=1)
        raise ValueError(f"no section {section!r}: {f'did you mean {near[0]}' if near else ', '.join(sections)}?")
    lines: list[str] = []
    for name in [section] if section else sections:
        lines.append(f"## {name}")
        # A setting of the whole run stands alone.
        for owner in kinds_of(sections[name]) or [kind]:
            about = (inspect.getdoc(owner) or "").partition("\n\n")[0]
            lines += [about, f"Source: `{owner.__module__.replace('.', '/')}.py`.", ""]
        for field in (one for one in fields_of(kind) if one.name.partition(".")[0] == name):
            text = f"- `{field.name}` ({field.kind}; {field.default or 'no default'}): {field.meaning}"
            lines += textwrap.wrap(text, 120, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)
        lines.append("")
    return "\n".join(lines)
