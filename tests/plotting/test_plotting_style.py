"""Texts of a corpus in figures: dollar signs are no mathematics, which might be italic letters or an error."""

from pathlib import Path

import numpy as np
import pytest
from IPython.core.interactiveshell import InteractiveShell
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from retro_nb import survey
from retro_nb.lab import sweep
from retro_nb.plotting import chunking, embedding, evaluation, leakage, overview, sampling, style, training
from retro_nb.plotting import survey as plots_of_survey
from retro_nb.text.document import Document
from retro_nb.training.log import History

ODD = r"$\odd$ 6"  # an error, if taken for mathematics
WORDS = [ODD, "and", "words"]
SQUARE = np.eye(3)
HISTORY = History([{"step": 1, "loss": 2.0, "valid_loss": 2.5}, {"step": 2, "loss": 1.0, "valid_loss": 2.0}])
TITLED = Document("A text of some words. " * 90, ODD, "here")


def of_sweep():
    plan = sweep.Sweep(ODD, Path("05.ipynb"), ODD, "word", ["word", "other"], [])
    return sweep.draw(plan, [{"word": ODD, "other": ODD, ODD: 1.0, "std": None, "n": 1}])


FIGURES = {
    "box": lambda: _boxed(ODD),
    "staircase": lambda: chunking.staircase([WORDS, WORDS]),
    "cut_text": lambda: chunking.cut_text(r"For $\odd$6 one", [(0, 8), (8, 15)]),
    "chunks_by_year": lambda: chunking.chunks_by_year([1790, 1800], [3, 4], {1: ODD}, (1791, 1795)),
    "framings": lambda: embedding.framings({ODD: WORDS}),
    "vector_map": lambda: embedding.vector_map(np.eye(2), np.array([1800, 1900]), {ODD: (0.0, 1.0)}, ODD),
    "similarity": lambda: embedding.similarity(SQUARE, ODD, ODD, ODD),
    "answers": lambda: evaluation.answers({ODD: {ODD: 0.5, "and": 0.1}}, {ODD: "neighbour"}, ODD),
    "attention_map": lambda: evaluation.attention_map(SQUARE, WORDS, WORDS, 1, ODD),
    "rewritings": lambda: evaluation.rewritings(SQUARE, WORDS, ODD),
    "bars": lambda: evaluation.bars({ODD: {"on": [1.0, 2.0]}}, "nats", ODD),
    "gains": lambda: evaluation.gains({ODD: {ODD: (1.0, 0.5, 1.5)}}, "bits", ODD),
    "hit_rates": lambda: evaluation.hit_rates({ODD: [0.5, 0.6]}),
    "sweeps": lambda: evaluation.sweeps({ODD: {ODD: [1.0, 2.0]}}, [1.0, 2.0], "bits", ODD),
    "overlap_histogram": lambda: leakage.overlap_histogram({ODD: np.array([0.1, 0.9])}, "Much"),
    "suffix_table": lambda: leakage.suffix_table(np.eye(3, dtype=int), WORDS, WORDS),
    "gain_by_overlap": lambda: leakage.gain_by_overlap([0.5, 1.0], {ODD: [(1.0, 0.5, 1.5)] * 2}, "Much"),
    "finding": lambda: overview.finding(ODD, ODD, ODD, ODD, ODD),
    "sampled": lambda: sampling.bars(WORDS, {ODD: [0.5, 0.5, 0.0]}, ODD),
    "drawn": lambda: sampling.drawn(WORDS, [0.5, 0.25, 0.25], [0.5, 0.3, 0.2], 10),
    "divergence": lambda: sampling.divergence({ODD: [0.0, 0.1, 0.2]}, 2),
    "losses": lambda: training.losses({ODD: HISTORY}, {ODD: 1.5}, "Much"),
    "lengths": lambda: plots_of_survey.lengths(survey([TITLED, TITLED], seconds=1, progress=False)),
    "sweep": of_sweep,
}


def _boxed(text: str):
    figure, axes = style.blank(2, 1)
    style.box(axes, 0.0, 0.0, 2.0, 1.0, text, colour="#FFFFFF")
    return figure


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_dollars_in_a_text_are_no_mathematics(draw):
    FigureCanvasAgg(draw()).draw()


def test_a_literal_text_shows_what_it_was():
    figure, axes = style.blank(4, 1)
    canvas = FigureCanvasAgg(figure)
    widths = []
    for text in ("costs $5 or $6", "costs $5 or §6"):
        shown = axes.text(0, 0, style.literal(text), family="monospace")
        widths.append(shown.get_window_extent(canvas.get_renderer()).width)
    assert widths[0] == pytest.approx(widths[1])
    assert style.literal("no dollar") == "no dollar"


def test_an_alternative_text_has_titles_axes_and_legends():
    figure = evaluation.sweeps({"neighbours": {"1": [2.0, 3.0], "2": [1.0, 2.0]}}, [2.0, 3.0], "bits", "Costs $2")
    text = style.alternative_text(figure)
    assert all(word in text for word in ("Costs $2", "neighbours", "bits", "RETRO", "baseline"))
    diagram = style.alternative_text(style.pipeline("text"))
    assert "vectors" in diagram and "01" not in diagram and len(diagram) <= style.LONGEST


def test_every_figure_has_an_alternative_text():
    for draw in FIGURES.values():
        figure = draw()
        assert figure is None or len(style.alternative_text(figure)) > 3


def test_jupyter_keeps_the_alternative_text():
    shell = InteractiveShell.instance()
    try:
        shell.display_formatter.formatters["image/png"].for_type(Figure, lambda figure: b"a picture")
        figure = evaluation.bars({"speeches": {"on": [1.0, 2.0]}}, "nats", "A title")
        for _ in range(2):  # it is not described twice
            style.subplots()
            data, about = shell.display_formatter.format(figure, include={"image/png"})
            assert data == {"image/png": b"a picture"} and "A title" in about["image/png"]["alt"]
    finally:
        InteractiveShell.clear_instance()
