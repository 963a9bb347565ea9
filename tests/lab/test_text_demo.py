"""The demo of text: the whole way on few of the shipped pairs, and that a second start repeats nothing."""

import lzma
from dataclasses import replace
from pathlib import Path

import pytest

import sret_scale.lab.text_demo as demo
from sret_scale.cli import main
from sret_scale.config.run_config import RunConfig, from_yaml, grad_accum_steps
from sret_scale.launch.preflight import start_run
from tests.forked import use_forks

SAMPLE = Path(__file__).parents[2] / "data_pipelines" / "sample" / "libreoffice_help"


@pytest.mark.multi_process
def test_the_demo_goes_the_whole_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def start(config: RunConfig, path: Path, *, num_ranks: int) -> int:
        train = replace(config.train, total_images=64, checkpoint_interval_images=0)
        telemetry = replace(config.telemetry, interval_steps=1)
        tiny = replace(config, train=train, telemetry=telemetry, optim=replace(config.optim, warmup_images=32))
        with pytest.MonkeyPatch.context() as patch:
            use_forks(patch)
            return start_run(tiny, path, num_ranks=num_ranks)

    sample = tmp_path / "sample"
    sample.mkdir()
    for part, count in (("train", 600), ("dev", 16), ("test", 16)):
        lines = lzma.decompress((SAMPLE / f"{part}.tsv.xz").read_bytes()).splitlines(keepends=True)
        short = [line for line in lines if len(line) < 100][:count]
        (sample / f"{part}.tsv.xz").write_bytes(lzma.compress(b"".join(short)))
    for name, value in {"SAMPLE": sample, "start_run": start, "VOCABULARY": 600, "DEEP_LOOPS": 4}.items():
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    output = tmp_path / "text"
    assert main(["demo", "text", "--output", str(output)]) == 0
    *_, note, last = capfd.readouterr().out.splitlines()
    assert (
        note.startswith("Of 16 sentences BLEU ")
        and "the German text as it is: " in note
        and last == "16 applications: no alarm"
    )
    columns, *rows = [line.split("\t") for line in (output / "translations.tsv").read_text().splitlines()]
    references = (output / "test.tsv").read_text().splitlines()
    assert columns == ["source", "translation", "reference"]
    assert len(rows) == 16 and all(f"{source}\t{target}" in references for source, _, target in rows)
    page = (output / "report.html").read_text()
    assert "translator" in page and "deep" in page and note.split(";")[0] in page
    assert from_yaml(output / "deep" / "config.yaml").model.num_applications == 16
    before = (output / "translator" / "checkpoints").stat().st_mtime
    assert main(["demo", "text", "--output", str(output)]) == 0
    assert (output / "translator" / "checkpoints").stat().st_mtime == before


def test_an_alarm_is_said_and_is_the_status(tmp_path: Path) -> None:
    assert demo.verdict(16, []) == ("16 applications: no alarm", 0)
    assert demo.verdict(16, ["a", "b"]) == ("16 applications: a; b", 1)


def test_the_shipped_pairs_are_split_and_whole() -> None:
    parts = {}
    for part, count in (("train", 31_141), ("dev", 772), ("test", 1_189)):
        lines = lzma.decompress((SAMPLE / f"{part}.tsv.xz").read_bytes()).decode().splitlines()
        assert len(lines) == count and all(line.count("\t") == 1 for line in lines)
        parts[part] = {side for line in lines for side in line.split("\t")}
    assert not parts["train"] & (parts["dev"] | parts["test"])


def test_the_deep_model_has_108_applications_on_any_number_of_ranks() -> None:
    for ranks in (1, 2, 4, 8, 16, 32):
        deep = demo.deep_config(demo.text_config(Path(), ranks))
        assert grad_accum_steps(deep.train, ranks) == 1 and deep.model.num_applications == 108
