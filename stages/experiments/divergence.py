"""How far experiments lie from the dense model, in the lines of llama.cpp's `llama-perplexity --kl-divergence`.

What reads that program's output reads these. Q is the pruned model and base the dense one. Errors are clustered by document, where
llama.cpp takes tokens as independent, and every token of a window counts but its first, where llama.cpp counts those of its second half.
"""

from stages import limits
from stages.evaluation.measurement import Difference, Kind, Measurement
from stages.evaluation.metrics.divergence import DELTA_P_QUANTILES, QUANTILES
from stages.experiments.reading import Experiment, Missing
from stages.experiments.table import by_protocol, title, without_table


def text(experiments: list[Experiment], missing: list[Missing]) -> str:
    """The tables of every experiment, one for each corpus, by protocol as in stages.experiments.table.

    Args:
        missing: what is not compared.
    """
    pieces = []
    for group in by_protocol(experiments):
        pieces.append(f"{title(group[0])}\n")
        for experiment in group:
            tables = {corpus: "\n".join(lines(experiment, corpus)) for corpus in experiment.protocol["corpora"]}
            pieces += [f"{head(experiment, corpus)}\n\n{table}\n" for corpus, table in tables.items() if table]
            if not any(tables.values()):
                pieces.append(f"{experiment.name}: divergence from the dense model was not measured; evaluation.metrics names what is\n")
    return "\n".join([*pieces, *without_table(experiments, missing)])


def head(experiment: Experiment, corpus: str) -> str:
    """What was pruned how, and scored on what, in how many documents, of which errors are made."""
    sparsity = f"{100 * experiment.prune_metrics['sparsity']:.3g}%"
    clusters = next(one.clusters for one in experiment.measurements if one.kind == Kind.CORPUS and one.name == corpus)
    scored = f"{limits.scored_text(experiment.protocol, corpus)}, of {limits.counted(clusters, 'document')}"
    return f"{experiment.name}: {experiment.method}, {experiment.pattern} {sparsity}; {scored}"


def lines(experiment: Experiment, corpus: str) -> list[str]:
    """The lines of one experiment on one corpus; none where its divergence was not measured."""
    ours, dense = (
        {measured.metric: measured for measured in of if (measured.kind, measured.name) == (Kind.CORPUS, corpus)}
        for of in (experiment.measurements, experiment.dense)
    )
    if "mean_kld" not in ours:
        return []
    perplexity = ours.get("perplexity")
    difference = None if perplexity is None else perplexity.difference
    correlation = ours.get("ln_ppl_correlation")
    rows = [
        "====== Perplexity statistics ======",
        _line("Mean PPL(Q)", perplexity),
        _line("Mean PPL(base)", dense.get("perplexity")),
        None if correlation is None else f"{correlation.label}: {correlation.value:6.2f}%",
        _line("Mean ln(PPL(Q)/PPL(base))", ours.get("perplexity_ln_ratio")),
        _line("Mean PPL(Q)/PPL(base)", ours.get("perplexity_ratio")),
        _line("Mean PPL(Q)-PPL(base)", difference),
        "",
        "====== KL divergence statistics ======",
        _line("Mean    KLD", ours["mean_kld"], width=0),
        *(_line(_padded(label), ours.get(metric), width=0) for metric, (_, label) in QUANTILES.items()),
        "",
        "====== Token probability statistics ======",
        _percent("Mean    Δp", ours.get("mean_delta_p")),
        *(_percent(_padded(label), ours.get(metric)) for metric, (_, label) in DELTA_P_QUANTILES.items()),
        _percent("RMS Δp    ", ours.get("rms_delta_p")),
        _percent("Same top p", ours.get("same_top_p")),
    ]
    return [row for row in rows if row is not None]


def _line(label: str, measured: Measurement | Difference | None, width: int = 30) -> str | None:
    if measured is None:
        return None
    return f"{label:<{width}}: {measured.value:10.6f}" + ("" if measured.stderr is None else f" ± {measured.stderr:10.6f}")


def _percent(label: str, measured: Measurement | None) -> str | None:
    if measured is None:
        return None
    return f"{label}: {measured.value:6.3f}" + ("%" if measured.stderr is None else f" ± {measured.stderr:5.3f} %")


def _padded(label: str) -> str:
    """The label of a quantile, its first word as wide as the others': "Median  KLD", " 5.0%   KLD"."""
    first, _, quantity = label.partition(" ")
    return f"{f'{first:>5}':<7} {quantity}"
