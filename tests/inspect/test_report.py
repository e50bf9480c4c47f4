"""Tests of the density heat map and the token page."""

import json
import struct
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from spkv.inspect import plot_density, report, write_token_page

NASTY = [
    "<script>alert(1)</script>",
    "</script>",
    "<!--",
    " a&amp;b",
    "&",
    '"\\',
    "{{title}}",
    "same",
    "same",
]
NASTY += ["", "\n\n", "\r\n", "\x00\x1b", "\ufffd", "\u2028", "\u202e", "مر", "👩", "\ud83d"]


def png_size(path):
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


class Page(HTMLParser):
    """The tags of a page with their attributes, and the text directly inside each kind of tag."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.attributes, self.texts, self.open = [], {}, {}, ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.setdefault(tag, []).extend(dict(attrs).items())
        self.open = "data" if ("id", "data") in attrs else tag

    def handle_data(self, data):
        self.texts.setdefault(self.open, []).append(data)

    def data(self):
        return json.loads("".join(self.texts["data"]))


@pytest.mark.parametrize(
    ("shape", "missing"),
    [((1, 1), 0), ((1, 1), 1), ((1, 16), 3), ((28, 4), 0), ((28, 4), 9), ((80, 16), 80), ((2, 130), 260)],
)
def test_density_is_a_png_of_sensible_size(tmp_path, shape, missing):
    density = np.linspace(0, 1, shape[0] * shape[1], dtype=np.float32).reshape(shape)
    density.flat[:missing] = np.nan
    path = tmp_path / "density.out"
    plot_density(density, path, title="a $title with no_formula^ in it " * 4)
    width, height = png_size(path)
    assert 600 <= width <= 2100
    assert 400 <= height <= 4000


def drawn(monkeypatch, tmp_path, *args, **kwargs):
    """The figure that plot_density draws."""
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    plot_density(*args, tmp_path / "unused.png", **kwargs)
    return figures[0]


def test_density_labels(monkeypatch, tmp_path):
    density = [[0.25, np.nan], [0.75, 0.5], [0.5, 0.5]]
    figure = drawn(monkeypatch, tmp_path, density, title="some model", layer_indices=[3, 7, 31])
    axes, bar = figure.axes
    assert figure.get_suptitle() == "some model\nmean density 0.500 (5 of 6 heads)"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["3", "7", "31"]
    assert axes.yaxis_inverted()
    assert "density (kept pairs / pairs that have left the window)" in (bar.get_xlabel(), bar.get_ylabel())
    assert [text.get_text() for text in axes.texts] == ["0.25", "0.75", "0.50", "0.50", "0.50"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["nothing has left the window yet"]


def test_density_without_any_value_has_no_mean(monkeypatch, tmp_path):
    figure = drawn(monkeypatch, tmp_path, np.full((2, 2), np.nan))
    assert figure.get_suptitle() == "nothing has left the window yet"


def run_alone(code, *arguments):
    """Names of the modules that a new interpreter holds once it has run report.py and then ``code``."""
    # By its path: what the packages above it import is not this module's doing.
    script = "import runpy, sys; arguments = sys.argv[2:]; module = runpy.run_path(sys.argv[1])\n"
    command = [
        sys.executable,
        "-c",
        f"{script}{code}\nprint(*sys.modules)",
        report.__file__,
        *map(str, arguments),
    ]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def test_density_leaves_pyplot_alone(tmp_path):
    loads = run_alone("module['plot_density']([[0.5]], arguments[0])", tmp_path / "density.png")
    assert "matplotlib" in loads
    assert "matplotlib.pyplot" not in loads


def test_module_imports_neither_matplotlib_nor_torch():
    assert not {"matplotlib", "torch"} & set(run_alone("pass"))


def test_density_without_matplotlib(monkeypatch, tmp_path):
    for name in [*(n for n in sys.modules if n.startswith("matplotlib.")), "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "spkv\[plots\]"'):
        plot_density([[0.5]], tmp_path / "d.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("density", "layers", "message"),
    [
        ([0.5], None, r"shaped \[layers, kv_heads\], got shape \(1,\)"),
        (np.zeros((0, 4)), None, r"non-empty .* got shape \(0, 4\)"),
        ([[0.5, 1.25]], None, r"in \[0, 1\] or nan, got 1.25 at index \[0, 1\]"),
        ([[-0.5]], None, r"got -0.5 at index \[0, 0\]"),
        ([[np.inf]], None, "got inf"),
        ([["a"]], None, "must be an array of numbers"),
        ([[0.5], [0.5]], [1], r"layer_indices must be 2 integers.* got shape \(1,\)"),
        ([[0.5]], [1.5], "layer_indices must be 1 integers.* float64"),
    ],
)
def test_density_errors(tmp_path, density, layers, message):
    with pytest.raises(ValueError, match=message):
        plot_density(density, tmp_path / "d.png", layer_indices=layers)
    assert not list(tmp_path.iterdir())


def test_page_holds_every_token_once_in_order_and_runs_none(tmp_path):
    shares = np.linspace(0, 1, len(NASTY))
    write_token_page(
        tmp_path / "page.html",
        NASTY,
        shares,
        window=3,
        title="<b>T</b> & {{data}}",
        summary={"a<b": "</table>&"},
    )
    page = Page(tmp_path / "page.html")
    data = page.data()
    assert data["tokens"] == NASTY
    np.testing.assert_allclose(np.array(data["shares"]) / data["units"], shares, atol=0.5e-4)
    assert data["window"] == 3
    assert page.tags.count("script") == 2
    assert page.source.count("</script") == 2
    assert "<!--" not in page.source
    assert page.texts["h1"][0] == page.texts["title"][0] == "<b>T</b> & {{data}}"
    assert page.texts["th"] == ["a<b"]
    assert page.texts["td"][0] == "</table>&"
    assert page.tags.count("table") == 1


def test_page_refers_to_nothing_outside(tmp_path):
    write_token_page(tmp_path / "page.html", ["a"], [0.5], title="t")
    page = Page(tmp_path / "page.html")
    assert not {"link", "img", "iframe", "table"} & set(page.tags)
    assert not {"src", "href"} & {name for pairs in page.attributes.values() for name, _ in pairs}
    assert "http:" not in page.source
    assert "https:" not in page.source
    assert "url(" not in page.source
    assert "{{" not in page.source
    assert page.data()["window"] == 0


def test_page_stays_moderate_with_long_text(tmp_path):
    write_token_page(tmp_path / "page.html", [" token"] * 32768, np.full(32768, 1 / 3, np.float32), title="t")
    assert (tmp_path / "page.html").stat().st_size < 600_000


def test_page_survives_an_unencodable_title(tmp_path):
    write_token_page(tmp_path / "page.html", ["a"], [1.0], title="broken \ud83d")
    assert Path(tmp_path / "page.html").read_text(encoding="utf-8").count("broken ?") == 2


@pytest.mark.parametrize(
    ("tokens", "kept", "window", "message"),
    [
        ([], [], None, r"tokens must be a non-empty list of str, got '\[\]'"),
        ("text", [0.5] * 4, None, "tokens must be a non-empty list of str, got 'text'"),
        (["a", 5], [0.5, 0.5], None, "got int at index 1"),
        (["a", "b"], [0.5], None, "got 1 for 2 tokens"),
        (["a"], [[0.5]], None, r"shaped \[tokens\], got shape \(1, 1\)"),
        (["a", "b"], np.array([0, 1]), None, "got int64: divide counts by"),
        (["a"], [1.5], None, r"kept must be in \[0, 1\], without nan, got 1.5 at index \[0\]"),
        (["a"], [np.nan], None, "got nan"),
        (["a"], [0.5], -1, "window must be an integer >= 0 or None, got -1"),
        (["a"], [0.5], 1.5, "window must be an integer >= 0 or None, got 1.5"),
        (["a"], [0.5], True, "window must be an integer >= 0 or None, got True"),
    ],
)
def test_page_errors(tmp_path, tokens, kept, window, message):
    with pytest.raises(ValueError, match=message):
        write_token_page(tmp_path / "page.html", tokens, kept, title="t", window=window)
    assert not list(tmp_path.iterdir())
