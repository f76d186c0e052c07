"""``nearfield analyse``: what embeddings look like, and how alike models are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nearfield.errors import BadInputError

if TYPE_CHECKING:
    from nearfield.analysis.run import Analysis


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("analyse")(analyse_command)


def analyse_command(
    models: Annotated[list[str], typer.Argument(help="Model folders or hub names.")],
    suite: Annotated[Path | None, typer.Option("--suite", help="Take the texts of a suite.")] = None,
    texts: Annotated[Path | None, typer.Option("--texts", help="Take the lines of this file.")] = None,
    limit: Annotated[int, typer.Option("--limit", help="Draw at most so many of them.")] = 5_000,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a page with pictures here; it needs no network.")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="E.g. cpu or cuda:0.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the drawing.")] = 0,
) -> None:
    """Isotropy, spectrum, intrinsic dimension, truncation and hubs of each model; CKA and shared neighbours of each pair."""
    from nearfield.cli.printing import quiet_libraries

    quiet_libraries()
    from rich.text import Text

    from nearfield.analysis.run import NEIGHBOURS, analyse
    from nearfield.console import stdout_console
    from nearfield.encoders.encode import text_encoder
    from nearfield.files import write_json

    if (suite is None) == (texts is None):
        raise BadInputError(
            "the texts come from --suite or from --texts", where="command line", hint="Give one of them."
        )
    found = _suite_texts(suite) if suite is not None else _lines(texts)
    chosen = _drawn(found, limit, seed)
    if len(chosen) < 4 * NEIGHBOURS:
        raise BadInputError(
            f"there are {len(chosen)} distinct texts; {4 * NEIGHBOURS} are needed", where=str(suite or texts)
        )
    vectors = {model: text_encoder(model, device=device)(chosen) for model in dict.fromkeys(models)}
    analysis = analyse(vectors, seed=seed)
    if json_out is not None:
        write_json(json_out, analysis.to_json())
    if html is not None:
        _write_page(html, analysis)
    console = stdout_console()
    console.print(_table(analysis))
    for sentence in [*(line for one in analysis.geometry for line in one.sentences), *analysis.sentences]:
        console.print(Text(sentence))


def _suite_texts(suite: Path) -> list[str]:
    from nearfield.evaluation.suite import open_suite
    from nearfield.evaluation.texts import benchmark_tasks

    return [text.text for task in benchmark_tasks(open_suite(suite)) for text in task.texts()]


def _lines(path: Path | None) -> list[str]:
    assert path is not None
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"this file of texts cannot be read ({error})", where=str(path)) from error


def _drawn(texts: list[str], limit: int, seed: int) -> list[str]:
    from nearfield.randomness import generator

    distinct = list(dict.fromkeys(text for text in texts if text.strip()))
    if len(distinct) <= limit:
        return distinct
    rows = generator(seed, "analyse").choice(len(distinct), size=limit, replace=False)
    return [distinct[row] for row in sorted(rows)]


ROWS = (
    ("dimensions", "dimensions", "d"),
    ("IsoScore", "iso_score", ".4f"),
    ("average cosine", "average_cosine", ".4f"),
    ("partition ratio", "partition_ratio", ".4f"),
    ("effective rank", "effective_rank", ".1f"),
    ("TwoNN", "two_nn", ".2f"),
    ("ABID", "abid", ".2f"),
    ("uniformity", "uniformity", ".3f"),
    ("hubs: skewness", "hub_skewness", ".2f"),
    ("hubs: largest", "largest_hub", "d"),
    ("texts near none", "orphans", ".1%"),
)


def _table(analysis: Analysis) -> object:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(f"{analysis.texts} texts"))
    table.add_column("")
    for model in analysis.models:
        table.add_column(model, justify="right", overflow="fold")
    for title, field, form in ROWS:
        table.add_row(title, *(format(getattr(one, field), form) for one in analysis.geometry))
    return table


def _write_page(path: Path, analysis: Analysis) -> None:
    """Pictures by plotly in one file: spectrum, truncation, and heat maps with like models side by side."""
    import html

    import numpy as np
    import plotly.graph_objects as go
    import plotly.io as pio
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    from nearfield.files import write_text

    figures = []
    spectrum = go.Figure(layout={"title": "Share of variance by principal axis", "yaxis": {"type": "log"}})
    for model, one in zip(analysis.models, analysis.geometry, strict=True):
        spectrum.add_scatter(y=[share or None for share in one.spectrum], name=model)
    figures.append(spectrum)
    curves = go.Figure(layout={"title": "Ten nearest texts kept by fewer dimensions", "xaxis": {"type": "log"}})
    for model, one in zip(analysis.models, analysis.geometry, strict=True):
        for control, points in one.truncation.items():
            x, y = zip(*points, strict=True)
            curves.add_scatter(x=x, y=y, name=f"{model}, {control}", mode="lines+markers")
    figures.append(curves)
    if len(analysis.models) > 1:
        for title, square in (("CKA", analysis.cka), ("Jaccard@10", analysis.jaccard)):
            values = np.array(square)
            order = leaves_list(linkage(squareform(1 - values, checks=False), "average"))
            names = [analysis.models[i] for i in order]
            figures.append(
                go.Figure(
                    go.Heatmap(
                        z=values[np.ix_(order, order)], x=names, y=names, zmin=0, zmax=1, texttemplate="%{z:.2f}"
                    ),
                    layout={"title": f"{title}, like models side by side"},
                )
            )
    parts = [
        pio.to_html(figure, full_html=False, include_plotlyjs=number == 0, config={"responsive": True})
        for number, figure in enumerate(figures)
    ]
    said = "".join(
        f"<p>{html.escape(line)}</p>"
        for line in [*(line for one in analysis.geometry for line in one.sentences), *analysis.sentences]
    )
    head = '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    title = "<title>Embeddings</title><body style='font-family:sans-serif;max-width:60rem;margin:auto'>"
    write_text(path, f"{head}{title}<h1>{analysis.texts} texts</h1>{said}{''.join(parts)}</body></html>\n")
