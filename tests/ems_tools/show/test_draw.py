"""Drawing: two pens from one layout, and legends that cover no line."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest

from dpm_solver_v3.ems_tools.show import Curve, Panel, plot_ems, png_of, svg_of
from dpm_solver_v3.ems_tools.show.png import PNGPen

SVG = "{http://www.w3.org/2000/svg}"
NAMES = [f"dpm_solver_v3_number_{k}, dpm_solver_v3_fitted" for k in range(5)]
STEEP = Panel("title", "steps", tuple(Curve(name, (5.0, 10.0), (k, 4 * k)) for k, name in enumerate(NAMES)))


@pytest.mark.parametrize("options", [{}, {"channels": 20, "evidence": False}, {"channels": 2, "spatial": (4, 5)}])
@pytest.mark.parametrize("statistics", [True, False])
def test_png_of_every_kind_of_file(tmp_path, make_ems_file, options, statistics):
    Image = pytest.importorskip("PIL.Image")
    plot_ems(make_ems_file(**options), tmp_path / "a.png", statistics=statistics)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width == (4 * 420 if statistics else 420)
        assert len(picture.convert("RGB").resize((90, 60)).getcolors(90 * 60)) > 10  # something is drawn


def test_the_legend_covers_no_line():
    root = ET.fromstring(svg_of([[STEEP]], "plot"))
    curves = [line for line in root.iter(f"{SVG}polyline") if line.get("stroke-width") == "1.8"]
    lowest = max(float(point.split(",")[1]) for line in curves for point in line.get("points", "").split())
    texts = {t.text: (float(t.get("x", "nan")), float(t.get("y", "nan"))) for t in root.iter(f"{SVG}text")}
    page = float(root.get("height", "nan"))
    assert len(curves) == 5
    assert all(lowest < texts[name][1] < page for name in NAMES)
    assert len({texts[name] for name in NAMES}) == 5


def test_a_single_point_shows_the_dashes_of_its_curve():
    """A file of one step count: two dots of one colour, of which nobody could say which is which."""
    curves = tuple(Curve(dash, (5.0,), (1.0,), dash=dash) for dash in ("solid", "dashed"))
    lines = ET.fromstring(svg_of([[Panel("", "steps", curves)]], "")).iter(f"{SVG}polyline")
    drawn = [line for line in lines if line.get("stroke-width") == "1.8"]
    assert [line.get("stroke-dasharray") is None for line in drawn] == [True, False]
    for line in drawn:
        (left, _), (right, _) = (point.split(",") for point in line.get("points", "").split())
        assert float(right) - float(left) > 20


def test_a_single_point_shows_its_interval():
    """A file of one step count: its interval was an area without width."""
    curve = Curve("", (5.0,), (1.0,), (0.5,), (1.5,))
    (band,) = ET.fromstring(svg_of([[Panel("", "steps", (curve,))]], "")).iter(f"{SVG}polygon")
    corners = [tuple(map(float, corner.split(","))) for corner in band.get("points", "").split()]
    xs, ys = ([corner[k] for corner in corners] for k in (0, 1))
    assert max(xs) - min(xs) > 20 and max(ys) - min(ys) > 50


@pytest.mark.parametrize("name", ["short", "juggernautXL_v9Rundiffusion", "a very " + "long " * 40 + "name"])
def test_a_title_stays_on_the_page(name):
    """Inspect EMS showed the middle of a long name."""
    pytest.importorskip("PIL.Image")
    title, pen = f"{name}.ems.safetensors", PNGPen(420, 400, 1.6)
    texts = ET.fromstring(svg_of([[STEEP]], title)).iter(f"{SVG}text")
    ((shown, size),) = [(t.text, int(t.get("font-size", ""))) for t in texts if t.text and t.text.endswith("tensors")]
    assert pen.width_of(shown, size) <= 420
    assert shown.startswith(name[:5]) and (shown == title) == (len(name) < 60)


def test_zoom_enlarges_the_page():
    Image = pytest.importorskip("PIL.Image")
    sizes = [Image.open(io.BytesIO(png_of([[STEEP]], "plot", zoom))).size for zoom in (1.0, 1.6)]
    assert sizes[1] == tuple(round(1.6 * n) for n in sizes[0])


def test_names_are_text_not_markup():
    panel = Panel("a <b> & c", "", (Curve("<script>", (1.0, 2.0), (1.0, 2.0)),))
    texts = [t.text for t in ET.fromstring(svg_of([[panel]], "&")).iter(f"{SVG}text")]
    assert {"a <b> & c", "<script>", "&"} <= set(texts)


@pytest.mark.parametrize("zoom", [1.0, 1.6, 0.7])
def test_dashes_end_and_leave_gaps(zoom):
    """Dash lengths that are no whole pixels once made this run for ever."""
    Image = pytest.importorskip("PIL.Image")
    pen = PNGPen(200, 20, zoom)
    pen.line([(10, 10), (60.3, 10), (190, 10)], "#000000", 3, "dashed")
    with Image.open(io.BytesIO(pen.finish())) as picture:
        row = [picture.convert("L").getpixel((u, round(10 * zoom))) < 128 for u in range(picture.width)]
    runs = sum(a and not b for a, b in pairwise(row))
    assert runs == 18  # 180 pixels, a dash every 10
