"""The plots, as Vega-Lite specifications without data: the page and the files put the data in under its name.

points       one row for each experiment, see content.points
references   the dense model and quantised models, as lines
tasks        the difference of each chosen experiment in each task
matrices     one row for each block and kind of matrix
"""

from typing import Any

import altair as alt

from stages.experiments.paired import Metric

Spec = dict[str, Any]

POINTS, REFERENCES, TASKS, MATRICES = "points", "references", "tasks", "matrices"
SHAPES = ["circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "triangle-right", "triangle-left"]
LIGHT = ["#2f6bd8", "#c2570c", "#12836f", "#a63a8c", "#8a6d00", "#7355cf", "#b8323f", "#2287b0", "#5b7d1e", "#6b6f76"]
DARK = ["#7fabff", "#f59a5b", "#4cc9b0", "#e58ad0", "#d9bd4a", "#b39dff", "#ff8a92", "#68c6ec", "#a6cc62", "#a9adb5"]
FONT = "system-ui, -apple-system, 'Segoe UI', Inter, 'Noto Sans', sans-serif"
WIDTH, CHARACTER = 900, 7  # pixels of a plot in a file, of a letter in a legend
SECONDS, MEMORY, ENERGY = "seconds", "peak_memory_gib", "kilojoules"
COSTS = {
    SECONDS: "seconds of pruning, one run",
    MEMORY: "peak memory of pruning [GiB], one run",
    ENERGY: "energy of pruning [kJ], one run",
}
CHOICE = alt.selection_point(name="chosen", fields=["method"], bind="legend")  # of a method, by its entry in the legend
DODGE = alt.ExprRef(expr="datum.dodge * min(1, width / 700)")  # pixels by which points of one sparsity stand apart
QUANTITIES = {
    "relative_error": "relative output error on calibration tokens",
    "relative_error_held_out": "relative output error on windows held out",
    "sparsity": "sparsity",
    "damping": "damping",
}


def theme(*, dark: bool) -> Spec:
    """Vega-Lite's configuration: colours that can be told apart on a light and on a dark ground, thin lines, plain words."""
    ink, quiet, line = ("#e7e9ec", "#a8adb5", "#31353c") if dark else ("#1d2126", "#5a616b", "#e3e6ea")
    words = {"labelColor": quiet, "titleColor": quiet, "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal"}
    return {
        "background": "transparent",
        "font": FONT,
        "view": {"stroke": None},
        "axis": {**words, "gridColor": line, "domainColor": line, "tickColor": line, "titlePadding": 12, "labelPadding": 6},
        "legend": {
            **words,
            "labelColor": ink,
            "labelLimit": 0,
            "symbolSize": 90,
            "symbolOpacity": 1,
            "symbolBaseFillColor": quiet,
            "symbolBaseStrokeColor": quiet,
            "rowPadding": 5,
            "columnPadding": 24,
            "layout": {"bottom": {"anchor": "start", "direction": "vertical", "margin": 14}},
        },
        "header": {**words, "labelColor": ink},
        "title": {"color": ink, "fontSize": 13, "fontWeight": "normal", "anchor": "start"},
        "text": {"color": quiet, "fontSize": 11},
        "rule": {"color": quiet},
        "range": {"category": DARK if dark else LIGHT},
    }


def frontier(metric: Metric, methods: list[str], patterns: list[str]) -> Spec:
    """A metric against sparsity by method, with 95% intervals, the Pareto front, and reference lines."""
    x = alt.X("sparsity:Q", title="sparsity (fraction of zeros)", axis=alt.Axis(format="%", tickCount=7), scale=_spread(padding=28))
    line = _points().transform_filter("datum.pattern == 'unstructured'").mark_line(strokeWidth=1.5, opacity=0.45, xOffset=DODGE)
    front = (
        _points()
        .transform_filter("datum.front")
        .mark_line(strokeWidth=9, opacity=0.28, color="#8a93a0", strokeJoin="round", strokeCap="round", xOffset=DODGE)
    )
    y, colour = _metric_y(metric), _colour(methods)
    layers = [
        front.encode(x=x, y=y, order="sparsity:Q"),
        *_reference_lines(metric),
        line.encode(x=x, y=y, color=colour, order="sparsity:Q", opacity=_chosen(0.45)),
        _intervals(xOffset=DODGE).encode(x=x, y=_low(metric), y2="high:Q", color=colour, opacity=_chosen(0.8)),
        _marks(xOffset=DODGE).encode(x=x, y=y, color=colour, shape=_shape(patterns), opacity=_chosen(1), tooltip=_tooltip(metric)),
    ]
    return _finished(alt.layer(*layers).add_params(CHOICE), height=430)


def cost(metric: Metric, measure: str, methods: list[str], patterns: list[str]) -> Spec:
    """A metric against the cost of pruning, by method, with 95% intervals; the sparsity stands beside each point."""
    x = alt.X(f"{measure}:Q", title=COSTS[measure], axis=alt.Axis(tickCount=6), scale=_spread(padding=28))
    y, colour = _metric_y(metric), _colour(methods)
    labels = _points().mark_text(align="left", dx=9, dy=-1).encode(x=x, y=y, text="asked_short:N", opacity=_chosen(0.9))
    layers = [
        _intervals().encode(x=x, y=_low(metric), y2="high:Q", color=colour, opacity=_chosen(0.8)),
        _marks().encode(x=x, y=y, color=colour, shape=_shape(patterns), opacity=_chosen(1), tooltip=_tooltip(metric)),
        labels,
    ]
    return _finished(alt.layer(*layers).add_params(CHOICE), height=340)


def tasks(reference: str = "the baseline") -> Spec:
    """The difference of each chosen experiment to a reference in each task, with paired 95% intervals."""
    rows = alt.Chart(alt.NamedData(name=TASKS))
    y = alt.Y("task:N", title=None, sort=None, axis=alt.Axis(grid=True, labelFontSize=13, labelLimit=160))
    offset = alt.YOffset("experiment:N", sort=None)
    colour = alt.Color("experiment:N", sort=None, title=None, legend=alt.Legend(orient="top", columns=1, symbolType="circle"))
    x = alt.X("value:Q", title=f"difference of accuracy to {reference}, paired, 95% interval", axis=alt.Axis(tickCount=8, format="+.2~f"))
    zero = alt.Chart(alt.InlineData(values=[{"zero": 0}])).mark_rule(strokeWidth=1.5).encode(x="zero:Q")
    ends = rows.transform_filter("datum.low != null").mark_rule(strokeWidth=2)
    marks = rows.mark_point(filled=True, size=70, opacity=1)
    told = ["experiment", "task", "rows", "accuracy", "baseline", "difference", "lost", "gained", "p_value", "verdict"]
    layers = [
        zero,
        ends.encode(y=y, yOffset=offset, x=alt.X("low:Q"), x2="high:Q", color=colour),
        marks.encode(y=y, yOffset=offset, x=x, color=colour, tooltip=[f"{name}:N" for name in told]),
    ]
    return _finished(alt.layer(*layers), height=alt.Step(15, **{"for": "offset"}))


def matrices(quantity: str) -> Spec:
    """A quantity by decoder block and kind of matrix."""
    tooltip = [alt.Tooltip("block:O", title="block"), alt.Tooltip("matrix:N", title="matrix")]
    tooltip += [alt.Tooltip("value:Q", title=QUANTITIES[quantity], format=".4~g"), alt.Tooltip("count:Q", title="matrices")]
    chart = (
        alt.Chart(alt.NamedData(name=MATRICES), title=QUANTITIES[quantity])
        .transform_filter(f"datum.quantity == '{quantity}'")
        .mark_rect(cornerRadius=1)
        .encode(
            x=alt.X("block:O", title="decoder block", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
            y=alt.Y("matrix:N", title=None, sort=None),
            color=alt.Color(
                "value:Q",
                title=None,
                scale=alt.Scale(scheme="cividis", zero=False),
                legend=alt.Legend(orient="bottom", gradientLength=180, gradientThickness=8, format=".3~g", tickCount=4),
            ),
            tooltip=tooltip,
        )
    )
    return _finished(chart, height=alt.Step(22))


def _points() -> alt.Chart:
    return alt.Chart(alt.NamedData(name=POINTS))


def _intervals(**facts: Any) -> alt.Chart:
    return _points().transform_filter("datum.low != null").mark_rule(strokeWidth=1.5, **facts)


def _marks(**facts: Any) -> alt.Chart:
    return _points().mark_point(filled=True, size=75, opacity=1, **facts)


def _spread(**facts: Any) -> alt.Scale:
    return alt.Scale(zero=False, nice=False, **facts)


def _scale(metric: Metric) -> alt.Scale:
    """Of a metric's axis: logarithmic for perplexity, which is never 0."""
    return alt.Scale(type="log", nice=False, padding=16) if metric.is_ratio else _spread(padding=16)


def _metric_y(metric: Metric) -> alt.Y:
    return alt.Y("value:Q", title=metric.axis, scale=_scale(metric), axis=alt.Axis(tickCount=8, format=",~g"))


def _low(metric: Metric) -> alt.Y:
    return alt.Y("low:Q", title=metric.axis, scale=_scale(metric))


def _colour(methods: list[str]) -> alt.Color:
    legend = alt.Legend(orient="bottom", columns=_columns(methods), symbolType="circle", symbolOpacity=1)
    return alt.Color("method:N", title="method", scale=alt.Scale(domain=methods), legend=legend)


def _columns(labels: list[str]) -> int:
    """As many columns of a legend as the width of a plot holds, and no more than five."""
    return max(1, min(5, WIDTH // (CHARACTER * max(map(len, labels)) + 60)))


def _shape(patterns: list[str]) -> alt.Shape:
    shapes = [SHAPES[index % len(SHAPES)] for index in range(len(patterns))]
    return alt.Shape("pattern:N", title="pattern", scale=alt.Scale(domain=patterns, range=shapes), legend=alt.Legend(orient="bottom"))


def _chosen(opacity: float) -> Any:
    """Full opacity of the methods chosen in the legend that the table's filter leaves, little of others."""
    return alt.when(CHOICE, alt.datum.shown != False).then(alt.value(opacity)).otherwise(alt.value(0.08))  # noqa: E712


def _reference_lines(metric: Metric) -> list[alt.Chart]:
    lines = alt.Chart(alt.NamedData(name=REFERENCES))
    y = alt.Y("value:Q", title=metric.axis, scale=_scale(metric))
    told = [alt.Tooltip("label:N", title="reference"), alt.Tooltip("size:N"), alt.Tooltip("text:N", title=metric.label)]
    told.append(alt.Tooltip("counted:N", title="measured on"))
    dashes = alt.StrokeDash("kind:N", legend=None, scale=alt.Scale(domain=["dense", "quantised"], range=[[1, 0], [2, 4]]))
    shift, drop = alt.ExprRef(expr="datum.shift"), alt.ExprRef(expr="datum.below ? 13 : -5")
    labels = lines.mark_text(align="right", baseline="alphabetic", dx=shift, dy=drop)
    return [
        lines.mark_rule(strokeWidth=1.2).encode(y=y, strokeDash=dashes, tooltip=told),
        labels.encode(y=y, x=alt.value("width"), text="label:N"),
    ]


def _tooltip(metric: Metric) -> list[alt.Tooltip]:
    return [
        alt.Tooltip("experiment:N", title="experiment"),
        alt.Tooltip("method:N", title="method"),
        alt.Tooltip("pattern:N", title="pattern"),
        alt.Tooltip("sparsity:Q", title="sparsity", format=".2%"),
        alt.Tooltip("weights:Q", title="of weights", format=","),
        alt.Tooltip("seed:N", title="calibration seed"),
        alt.Tooltip("text:N", title=metric.label),
        alt.Tooltip("against_dense:N", title="against dense"),
        alt.Tooltip("counted:N", title="measured on"),
        alt.Tooltip("seconds:Q", title="seconds", format=",.0f"),
        alt.Tooltip("peak_memory_gib:Q", title="peak memory [GiB]", format=".2f"),
        alt.Tooltip("kilojoules:Q", title="energy [kJ]", format=",.1f"),
        alt.Tooltip("device:N", title="device"),
    ]


def _finished(chart: Any, height: Any) -> Spec:
    spec: Spec = chart.properties(width="container", height=height).to_dict()
    del spec["config"]  # Altair's own; the theme replaces it
    return spec
