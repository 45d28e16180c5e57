"""The model card says what is in the configuration and nothing else; tables and plots show what they were given."""

from __future__ import annotations

import importlib.util
import math
import re
import struct
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.figure
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.text import Annotation, Text
from rich.console import Console
from rich.table import Table

from orthokv.bases.basis import orthonormal
from orthokv.checkpoint.card import model_card
from orthokv.checkpoint.read import read_checkpoint
from orthokv.checkpoint.write import record_measurements, write_checkpoint
from orthokv.planning.allocate import allocate
from orthokv.planning.plan import Plan
from orthokv.planning.profile import ErrorProfile, LayerProfile
from orthokv.show.plots import plot_comparison, plot_plan, plot_profile, style
from orthokv.show.results import ComparisonRow
from orthokv.show.tables import comparison_table, plan_table, profile_table
from orthokv.spec.budget import Budget
from orthokv.spec.errors import InvalidSetting
from orthokv.spec.footprint import dense_bytes
from orthokv.spec.geometry import Geometry
from orthokv.spec.rankgrid import candidate_ranks
from orthokv.spec.sharing import group_width
from orthokv.spec.vocabulary import SHARINGS, KeyMode, Sharing

HEADS, HEAD_DIM = 4, 16
MEASURED = {
    "perplexity": 38.2914,
    "perplexity_dense": 31.8302,
    "kl": 0.18123,
    "kept": 0.25312,
    "cache_bytes_per_token": 324.0,
    "cache_bytes_per_token_dense": 1536.0,
    "tokens": 8184,
    "layer_error": [0.1101, 0.3202, 0.1303],
    "layer_cosine": [0.9911, 0.9402, 0.9813],
    "tokens_per_second": 41.27,
    "tokens_per_second_dense": 52.91,
    "device": "cpu, 2 threads",
    "dataset": {"source": "/home/someone/data/calib.jsonl"},
}


def layer_of(
    index: int, layers: int, sharing: Sharing, sensitive: bool, generator: torch.Generator
) -> LayerProfile:
    bases = []
    for keys in (True, False):
        stored, width = group_width(sharing, HEADS, HEAD_DIM, keys=keys)
        q, _ = torch.linalg.qr(torch.randn(stored, width, width, generator=generator))
        bases.append(orthonormal(q, HEADS, HEAD_DIM))
    ranks = [candidate_ranks(basis.width) for basis in bases]
    shares = [torch.tensor(r, dtype=torch.float64) / b.width for r, b in zip(ranks, bases, strict=True)]
    weight = 0.3 + 0.3 * index / layers
    key = (0.5 - weight / 2) * (torch.exp(-5 * shares[0]) - math.exp(-5))
    value = weight * (torch.exp(-2.6 * shares[1]) - math.exp(-2.6))
    error = (key[:, None] ** 2 + value[None, :] ** 2).sqrt()
    sensitivity = 0.2 + 3 * math.exp(-index / 3) if sensitive else None
    return LayerProfile(index, sharing, *bases, *ranks, error, 1 - error**2 / 2, sensitivity)


def profile_of(
    layers: int = 3,
    sharing: Sharing = "joint",
    key_mode: KeyMode = "pre",
    *,
    sensitive: bool = True,
    **changes: Any,
) -> ErrorProfile:
    generator = torch.Generator().manual_seed(0)
    parts: dict[str, Any] = {
        "geometry": Geometry("llama", layers, 128, 8, HEADS, HEAD_DIM, 512, {"rope_theta": 1e4}, "ab" * 32),
        "key_mode": key_mode,
        "sharing": sharing,
        "layers": tuple(layer_of(i, layers, sharing, sensitive, generator) for i in range(layers)),
        "model": {
            "id": "/home/someone/models/demo-llama",
            "revision": None,
            "digest": "ef" * 32,
            "fingerprints": {"float32": "a", "bfloat16": "b", "float16": "c"},
        },
        "dataset": {
            "source": "/home/someone/data/calib.jsonl",
            "digest": "cd" * 32,
            "num_samples": 64,
            "sequence_length": 512,
            "positions": 512,
            "held_out": 8,
        },
        "method": {"name": "stiefel", "parameterisation": "direct", "steps": 100, "refine_steps": 0},
        "seed": 7,
    }
    return ErrorProfile(**parts | changes)


def plan_of(profile: ErrorProfile, kept: float = 0.25) -> Plan:
    return allocate(profile, Budget("kept", kept))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    profile = profile_of()
    return write_checkpoint(profile, plan_of(profile), tmp_path_factory.mktemp("card") / "out").config


def rows_of(
    names: list[str], kepts: tuple[float, ...] = (0.5, 0.25), key_mode: str = "pre"
) -> list[ComparisonRow]:
    return [
        ComparisonRow(
            method=name.split(":")[0],
            sharing=name.split(":")[1],
            key_mode=key_mode,
            kept_asked=kept,
            kept=kept - 0.001 * place,
            cache_bytes_per_token=int(4096 * kept),
            perplexity=31.83 * (1 + (0.05 + 0.03 * place) * (1 / kept - 1)),
            perplexity_dense=31.83,
            kl=0.1,
            layer_error=0.05,
            seconds=12.34,
        )
        for place, name in enumerate(names)
        for kept in kepts
    ]


EIGHT = [f"{m}:{s}" for m in ("eigen", "stiefel", "weighted") for s in SHARINGS][:8]


def section(card: str, title: str) -> str:
    return card.split(f"## {title}\n")[1].split("\n## ")[0]


def rendered(table: Table, width: int = 160) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


# ---------------------------------------------------------------------------------------------- model card


@pytest.mark.parametrize("sharing", SHARINGS)
def test_the_card_names_the_ranks_of_every_layer(sharing: Sharing, tmp_path: Path) -> None:
    profile = profile_of(4, sharing)
    plan = plan_of(profile)
    card = model_card(write_checkpoint(profile, plan, tmp_path / "out").config)
    found = {
        line.split(" | ")[0]: line.split(" | ") for line in section(card, "Ranks").splitlines() if "%" in line
    }
    assert list(found) == [f"| {i}" for i in range(4)]
    for i, (layer, ranks) in enumerate(zip(profile.layers, plan.ranks, strict=True)):
        totals = [b.groups * r for b, r in zip((layer.key, layer.value), ranks, strict=True)]
        assert found[f"| {i}"][1:3] == [f"{totals[0] / HEADS:g}", str(totals[0])]
        assert found[f"| {i}"][4:6] == [f"{totals[1] / HEADS:g}", str(totals[1])]


def test_an_unmeasured_plan_says_so(config: dict[str, Any]) -> None:
    quality = section(model_card(config), "Quality")
    assert quality.strip() == "Quality was not measured for this plan."


def test_the_checkpoints_readme_follows_its_measurements(tmp_path: Path) -> None:
    profile = profile_of()
    out = tmp_path / "out"
    before = write_checkpoint(profile, plan_of(profile), out)
    assert (out / "README.md").read_text() == model_card(before.config)
    record_measurements(out, MEASURED)
    after = (out / "README.md").read_text()
    assert after == model_card(read_checkpoint(out).config)
    assert "38.29" in after
    assert "not measured for this plan" not in after


@given(keys=st.sets(st.sampled_from(sorted(MEASURED)), min_size=1))
@settings(max_examples=40, deadline=None)
def test_each_number_of_the_quality_section_is_in_the_config(config: dict[str, Any], keys: set[str]) -> None:
    measured = {key: MEASURED[key] for key in keys}
    quality = section(model_card({**config, "measured": measured}), "Quality")
    # Indices of layers, and the names of the device and the data set, are text.
    quality = re.sub(r"\(layer \d+\)|`[^`]*`", "", quality)
    known: list[float] = []
    for value in measured.values():
        known += value if isinstance(value, list) else [value] if isinstance(value, float | int) else []
    if {"perplexity", "perplexity_dense"} <= keys:
        known.append(MEASURED["perplexity"] / MEASURED["perplexity_dense"])
    for text, sign in re.findall(r"(\d+(?:\.\d+)?(?:e-?\d+)?)( %)?", quality):
        shown = float(text) / (100 if sign else 1)
        assert any(abs(shown - value) <= 6e-4 * max(1, abs(value)) for value in known), text


def test_every_measurement_is_shown(config: dict[str, Any]) -> None:
    quality = section(model_card({**config, "measured": MEASURED}), "Quality")
    for text in (
        "| 38.29 | 31.83 |",
        "1.203",
        "0.1812",
        "25.3 %",
        "| 324 | 1536 |",
        "8184",
        "(layer 1) | 0.3202",
    ):
        assert text in quality
    assert "(layer 1) | 0.9402" in quality
    assert "| 41.27 | 52.91 |" in quality
    assert "`calib.jsonl`, the source of the calibration text" in quality


@pytest.mark.parametrize(
    "base", ["/home/someone/models/demo-llama", "models/demo-llama", "../demo-llama", r"C:\models\demo-llama"]
)
def test_a_local_base_path_is_not_published(base: str, config: dict[str, Any]) -> None:
    card = model_card({**config, "base_model": {"id": base, "revision": None, "digest": "ef" * 32}})
    assert "base_model" not in yaml.safe_load(card.split("---")[1])
    assert "`demo-llama`" in card
    assert base not in card
    assert "/home/someone" not in card  # of the data set neither


@pytest.mark.parametrize("base", ["meta-llama/Llama-3.2-1B", "gpt2", "null"])
def test_a_hub_base_is_published_and_loaded_at_its_revision(base: str, config: dict[str, Any]) -> None:
    card = model_card({**config, "base_model": {"id": base, "revision": "0123abc", "digest": "ef" * 32}})
    front = yaml.safe_load(card.split("---")[1])
    assert front == {
        "library_name": "transformers",
        "base_model": base,
        "tags": ["kv-cache", "orthokv", "low-rank"],
    }
    assert f'from_pretrained("{base}", revision="0123abc")' in section(card, "Load")


def test_the_card_says_how_to_load_each_form(config: dict[str, Any]) -> None:
    adapter = section(model_card({**config, "form": "adapter"}), "Load")
    full = section(model_card({**config, "form": "full"}), "Load")
    assert "orthokv.attach(model, " in adapter
    assert "attach" not in full
    assert "import orthokv\n" in full
    for text in (adapter, full):
        compile(text.split("```python\n")[1].split("```")[0], "card", "exec")


def test_the_card_states_how_it_was_made(config: dict[str, Any]) -> None:
    made = section(model_card(config), "How it was made")
    for text in (
        "stiefel",
        "steps 100",
        "joint",
        "64 samples x 512",
        "8 of them held out",
        "cd" * 32,
        "0 to 511",
    ):
        assert text in made
    assert "| seed | 7 |" in made
    assert "orthokv " in made


def test_the_limits_fit_the_key_mode(config: dict[str, Any]) -> None:
    pre = section(model_card({**config, "key_mode": "pre"}), "Limits")
    post = section(model_card({**config, "key_mode": "post"}), "Limits")
    plain = section(
        model_card({**config, "key_mode": "post", "geometry": {**config["geometry"], "rope": None}}), "Limits"
    )
    assert "rebuilt and rotated at every decoding step" in pre
    assert "absolute positions" in post
    assert "rebuilt" not in post
    assert "absolute positions" not in plain
    for text in (pre, post, plain):
        assert "positions 0 to 511. Quality beyond them is not measured" in text


def test_names_from_outside_stay_inert(config: dict[str, Any]) -> None:
    evil = "x|`<img src=x>`\n\n# Hello | [click](javascript:0).txt"
    dataset = {**config["dataset"], "source": evil}
    card = model_card({**config, "dataset": dataset, "base_model": {"id": evil, "revision": None}})
    assert "\n# Hello" not in card
    assert len(re.findall(r"^#+ ", card, re.MULTILINE)) == 9
    for line in card.splitlines():
        if "click" in line and line.startswith("|"):
            assert line.count("|") == 3


# -------------------------------------------------------------------------------------------------- tables


def test_the_profile_table_shows_measured_errors() -> None:
    profile = profile_of(5, "tied")
    text = rendered(profile_table(profile))
    for layer in profile.layers:
        line = next(line for line in text.splitlines() if re.match(rf"\s*{layer.index} ", line))
        half, quarter = (layer.ranks_key.index(int(share * HEAD_DIM)) for share in (0.5, 0.25))
        assert f"{layer.error[half, half]:#.3g}" in line
        assert f"{layer.error[quarter, quarter]:#.3g}" in line
        assert "4 x 16" in line


def test_a_profile_without_sensitivities_shows_none() -> None:
    assert rendered(profile_table(profile_of(2, sensitive=False))).rstrip().endswith("-")


def test_the_plan_table_adds_up() -> None:
    profile = profile_of(4)
    plan = plan_of(profile)
    table = plan_table(plan, profile)
    totals = [[int(cell) for cell in list(table.columns[i].cells)[:4]] for i in (2, 5)]  # type: ignore[arg-type]
    positions = 4
    assert 2 * sum(map(sum, totals)) + positions == plan.bytes_per_token
    assert f"{plan.bytes_per_token} of {plan.dense_bytes_per_token} bytes" in rendered(table)


def test_the_comparison_marks_the_lowest_perplexity_of_each_budget() -> None:
    rows = rows_of(["eigen:tied", "stiefel:tied", "stiefel:joint"])
    table = comparison_table(rows, 31.83)
    assert table.row_count == 7
    assert [row.style for row in table.rows] == [None, "bold", "bold", None, None, None, None]
    assert "31.83" in rendered(table)


def test_a_row_keeps_its_fields() -> None:
    row = rows_of(["eigen:tied"])[0]
    assert ComparisonRow(**row.to_dict()) == row


# --------------------------------------------------------------------------------------------------- plots


def chunks(path: Path) -> dict[str, bytes]:
    """The chunks of a PNG file by type, checked: signature and checksums."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    found, at = {}, 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + body)
        found[kind.decode()] = body
        at += length + 12
    return found


@pytest.mark.parametrize("layers", [1, 13])
def test_plots_are_png_files_of_a_readable_size(layers: int, tmp_path: Path) -> None:
    profile = profile_of(layers)
    written = [
        plot_profile(profile, tmp_path / "profile"),
        plot_plan(plan_of(profile), profile, tmp_path / "plan.png"),
    ]
    for path in written:
        width, height = struct.unpack(">2I", chunks(path)["IHDR"][:8])
        assert 1000 <= width <= 2000
        assert 600 <= height <= 2000
    assert written[0] == tmp_path / "profile"


def test_plots_are_deterministic_and_carry_no_text(tmp_path: Path) -> None:
    profile = profile_of(1)
    for draw in (
        lambda path: plot_profile(profile, path),
        lambda path: plot_plan(plan_of(profile), profile, path),
        lambda path: plot_comparison(rows_of(EIGHT[:3]), path),
    ):
        first, second = draw(tmp_path / "a.png"), draw(tmp_path / "b.png")
        assert first.read_bytes() == second.read_bytes()
        assert set(chunks(first)) == {"IHDR", "pHYs", "IDAT", "IEND"}


def shown_texts(figure: matplotlib.figure.Figure) -> list[tuple[str, Any]]:
    """Every text that a figure draws, with its box in pixels."""
    texts: list[Text] = list(figure.texts)
    for axes in figure.axes:
        assert isinstance(axes, Axes)
        titles = [artist for artist in axes.get_children() if isinstance(artist, Text)]
        texts += [*titles, axes.xaxis.label, axes.yaxis.label]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            # Inner panels have ticks without labels.
            places = zip(axis.get_ticklabels(), axis.get_ticklocs(), strict=False)
            texts += [label for label, place in places if low <= place <= high]
    unique = {id(text): text for text in texts if text.get_visible() and text.get_text().strip()}
    # An annotation's own box would take in its line.
    boxes = [
        (t.get_text(), Text.get_window_extent(t) if isinstance(t, Annotation) else t.get_window_extent())
        for t in unique.values()
    ]
    return boxes


@pytest.mark.parametrize(
    "name", ["profile 1", "profile 5", "profile 11", "profile 32", "plan 2", "plan 32", "1", "8"]
)
def test_no_text_overlaps_or_is_cut_off(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda self, *_, **__: figures.append(self))
    kind, _, count = name.rpartition(" ")
    if kind == "profile":
        plot_profile(profile_of(int(count)), tmp_path / "x.png")
    elif kind == "plan":
        profile = profile_of(int(count))
        plot_plan(plan_of(profile), profile, tmp_path / "x.png")
    else:
        plot_comparison(rows_of(EIGHT[: int(count)], (0.5, 0.25, 0.125)), tmp_path / "x.png")
    (figure,) = figures
    figure.draw_without_rendering()
    boxes = shown_texts(figure)
    assert len(boxes) > 8
    for i, (text, box) in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0, text
        assert box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0, text
        assert box.y1 <= figure.bbox.y1, text
        for other, beside in boxes[:i]:
            apart = box.x1 <= beside.x0 or beside.x1 <= box.x0 or box.y1 <= beside.y0 or beside.y1 <= box.y0
            assert apart, f"{text!r} overlaps {other!r}"


def test_a_large_profile_shows_twelve_layers_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda self, *_, **__: figures.append(self))
    plot_profile(profile_of(32), tmp_path / "x.png")
    titles = [axes.get_title(loc="left") for axes in figures[0].axes]
    shown = [title for title in titles if title.startswith("layer")]
    assert (len(shown), shown[0], shown[-1]) == (12, "layer 0", "layer 31")
    assert any("12 of 32 layers" in text.get_text() for text in figures[0].texts)


def test_the_best_split_has_the_least_error_of_its_cache_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda self, *_, **__: figures.append(self))
    profile = profile_of(1)
    plot_profile(profile, tmp_path / "x.png")
    dots = [line for line in figures[0].axes[0].lines if line.get_marker() == "o"]
    assert len(dots) == 2
    for dot, kept in zip(dots, (0.25, 0.5), strict=True):
        value, key = float(dot.get_xdata()[0]), float(dot.get_ydata()[0])
        assert value + key == pytest.approx(2 * kept)
        plan = plan_of(profile, kept + 4 / dense_bytes(profile.geometry))
        width = profile.layers[0].key.width
        assert (key, value) == pytest.approx([rank / width for rank in plan.ranks[0]], abs=1.5 / 32)


def test_a_perplexity_that_is_not_finite_is_left_out_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(["eigen:tied", "stiefel:joint"])
    broken = [replace(rows[0], perplexity=math.inf), *rows[1:]]
    figures: list[Any] = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda self, *_, **__: figures.append(self))
    plot_comparison(broken, tmp_path / "x.png")
    assert any("1 measurement without" in text.get_text() for text in figures[0].texts)
    for nothing in ([], [replace(row, perplexity=math.nan) for row in rows]):
        with pytest.raises(InvalidSetting, match="finite"):
            plot_comparison(nothing, tmp_path / "x.png")


def test_names_with_markup_of_the_plotting_library_are_drawn_as_they_are(tmp_path: Path) -> None:
    model = {"id": r"/models/a$\frac$_b", "revision": None}
    profile = profile_of(1, model=model, method={"name": r"$\x$"})
    plot_profile(profile, tmp_path / "a.png")
    plot_comparison(rows_of([r"$\x$:joint"]), tmp_path / "b.png")


def test_plots_without_matplotlib_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InvalidSetting, match=r"plots need the extra orthokv\[plots\]"):
        plot_comparison(rows_of(["eigen:tied"]), tmp_path / "x.png")
    with pytest.raises(InvalidSetting, match=r"orthokv\[plots\]"):
        plot_profile(profile_of(1), tmp_path / "x.png")


def test_the_library_imports_where_matplotlib_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    for file in Path(style.__file__).parent.glob("*.py"):
        spec = importlib.util.spec_from_file_location("orthokv_plots_again", file)
        assert spec is not None
        assert spec.loader is not None
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


@given(wanted=st.lists(st.floats(-0.5, 1.5), min_size=1, max_size=12), gap=st.floats(0.001, 0.08))
def test_labels_are_spread_apart_in_order_and_inside(wanted: list[float], gap: float) -> None:
    found = style.spread(wanted, gap, 0.0, 1.0)
    for a, b in zip(sorted(found), sorted(found)[1:], strict=False):
        assert b - a >= gap - 1e-9
    assert min(found) >= -1e-9
    assert max(found) <= 1 + 1e-9
    assert sorted(range(len(found)), key=lambda i: (found[i], i)) == sorted(
        range(len(found)), key=lambda i: (wanted[i], i)
    )
    if len(wanted) == 1 and 0 <= wanted[0] <= 1:
        assert found == wanted


@given(low=st.floats(1e-4, 50), factor=st.floats(1.5, 1e4))
def test_levels_are_round_numbers_within_the_range(low: float, factor: float) -> None:
    levels = style.round_levels(low, low * factor)
    assert len(levels) <= 9
    assert levels == sorted(levels)
    for level in levels:
        assert low <= level <= low * factor
        assert len(f"{level:e}".split("e")[0].rstrip("0").rstrip(".")) <= 3
