"""Which figures a report has: what of the runs each shows, and the sentence below it."""

from collections.abc import Sequence

import numpy as np

from sret_scale.lab.report.chart import Caption, Chart
from sret_scale.lab.report.compare import teacher_of
from sret_scale.lab.report.plots import MOST_LABELS, SMOOTH_FROM, Curve, line_chart, smoothed
from sret_scale.lab.report.run_record import RunRecord, measure_of
from sret_scale.lab.report.summary import evaluation_split
from sret_scale.runs.metrics_log import Series

Drawn = tuple[list[Curve], Caption]


def basic_figures(runs: Sequence[RunRecord], colours: Sequence[str], *, named: bool = True) -> list[Chart]:
    """Accuracy, losses, rate and gradient of the runs; a figure without values is left out.

    named: whether curves have their run's name; where they do not, the page has a legend of their colours.
    """
    curves = [
        _accuracy(runs, colours),
        _training_loss(runs, colours),
        _trained(runs, colours, "lr", "learning_rate", "Learning rate", "learning rate"),
        _trained(runs, colours, "grad_norm", "gradient_norm", "Gradient norm", "L2 norm before clipping"),
        _evaluation_loss(runs, colours),
    ]
    forms = (".1f", ".2f", ".2g", ".2g", ".2f")
    charts = [_lines(*drawn, form=form, named=named) for drawn, form in zip(curves, forms, strict=True)]
    return [chart for chart in charts if chart is not None]


def _accuracy(runs: Sequence[RunRecord], colours: Sequence[str]) -> Drawn:
    curves = [
        Curve(label=run.name, colour=colour, series=main, faint=faint, kinds=("ema" if faint else "raw", "raw"))
        for run, colour in zip(runs, colours, strict=True)
        for main, faint in [_by_weights(run, run.accuracy[0], 100.0)]
    ]
    split = evaluation_split(runs[0])
    averaged = any(curve.faint is not None and len(curve.faint.images) > 1 for curve in curves)
    text = f"On the {split} split, each sample counted once." + (
        " Strong lines: averaged weights (EMA); faint lines: the weights as trained." if averaged else ""
    )
    words = " or ".join(dict.fromkeys(run.accuracy[1] for run in runs))
    caption = Caption(name="accuracy", title="Accuracy", text=text, x_label="samples seen", y_label=f"{words}, %")
    return curves, caption


def _training_loss(runs: Sequence[RunRecord], colours: Sequence[str]) -> Drawn:
    curves = [_trained_curve(run, colour, "loss") for run, colour in zip(runs, colours, strict=True)]
    text = "Strong lines are averages over neighbouring steps." if any(curve.faint for curve in curves) else ""
    if len({teacher_of(run) is None for run in runs}) > 1:
        text += " A distilled run's loss measures the distance to its teacher: compare its course, not its height."
    caption = Caption(
        name="training_loss", title="Training loss", text=text.strip(), x_label="samples seen", y_label="loss, nats"
    )
    return curves, caption


def _trained_curve(run: RunRecord, colour: str, field: str) -> Curve:
    """A number of every training line, averaged over neighbours where it is long."""
    measured = run.series("train", field)
    long = len(measured.images) >= SMOOTH_FROM
    faint, kind = (measured, "mean") if long else (None, "measured")
    return Curve(label=run.name, colour=colour, series=smoothed(measured), faint=faint, kinds=(kind, "measured"))


def _trained(runs: Sequence[RunRecord], colours: Sequence[str], field: str, name: str, title: str, label: str) -> Drawn:
    curves = [_trained_curve(run, colour, field) for run, colour in zip(runs, colours, strict=True)]
    return curves, Caption(name=name, title=title, text="", x_label="samples seen", y_label=label)


def _evaluation_loss(runs: Sequence[RunRecord], colours: Sequence[str]) -> Drawn:
    curves = [
        Curve(label=run.name, colour=colour, series=_by_weights(run, "loss", 1.0)[0])
        for run, colour in zip(runs, colours, strict=True)
    ]
    is_one = len(set(map(measure_of, runs))) == 1
    caption = Caption(
        name="evaluation_loss",
        title="Evaluation loss",
        text=f"Cross-entropy on the {evaluation_split(runs[0])} split: "
        + ("the same measure for every run." if is_one else "of different tasks or tokens, which do not compare."),
        x_label="samples seen",
        y_label="cross-entropy, nats",
    )
    return curves, caption


def _by_weights(run: RunRecord, field: str, factor: float) -> tuple[Series, Series | None]:
    """An evaluated quantity of the averaged weights with the raw ones behind it, or of the raw ones alone."""
    split = evaluation_split(run)
    raw, averaged = (
        Series(images=series.images, values=factor * series.values)
        for series in (run.series("eval", field, weights=weights, split=split) for weights in ("raw", "ema"))
    )
    return (averaged, raw) if len(averaged.images) else (raw, None)


def _lines(curves: list[Curve], caption: Caption, *, form: str, named: bool) -> Chart | None:
    """The chart of the curves that have a finite value; None where none has a course."""
    drawn = [curve for curve in curves if np.isfinite(curve.series.values).any()]
    if not any(np.isfinite(curve.series.values).sum() > 1 for curve in drawn):
        return None
    if not named or len(drawn) > MOST_LABELS:
        more = "One line per run, in the colours of the table." if named else "One line per run, coloured by depth."
        caption = Caption(**{**vars(caption), "text": f"{caption.text} {more}".strip()})
    return line_chart(drawn, caption, form=form, named=named)
