"""JSON of files is read through `data_pipelines.checked_files`; what parses by itself is named here with its reason."""

import ast

from tests.repo.test_structure import ROOT, product_files

ALLOWED = {
    ("data_pipelines/checked_files.py", 1): "the one door: names that are not UTF-8, after pydantic has refused them",
    ("sret_scale/config/ds_config.py", 1): "its hooks refuse keys that stand twice and numbers such as NaN",
    ("sret_scale/config/run_config.py", 1): "the way from dataclasses to plain values: no file",
}


def test_no_file_is_parsed_as_json_without_a_check() -> None:
    found = {}
    for file in product_files(".py"):
        calls = [
            node.lineno
            for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8")))
            if isinstance(node, ast.Attribute)
            and node.attr in ("load", "loads")
            and isinstance(node.value, ast.Name)
            and node.value.id == "json"
        ]
        if calls:
            found[str(file), len(calls)] = calls
        imported = "from json import" in (ROOT / file).read_text(encoding="utf-8")
        assert not imported, f"{file}: write json.loads in full, so that this test sees it"
    assert found.keys() == ALLOWED.keys(), {key: found.get(key) for key in found.keys() ^ ALLOWED.keys()}
