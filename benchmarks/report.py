"""Tables and plots of docs/results.md from the result files: ``python -m benchmarks.report [--check]``.

A table stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``; what is between them is never written by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import nesting, promise
from benchmarks.ablation import ABLATIONS
from benchmarks.bench import RESULTS, ROOT, rows_of
from benchmarks.quality import plot_quality
from orthokv.show.results import ComparisonRow, summarise
from orthokv.show.tables import details_markdown, ratios_markdown
from orthokv.show.wording import markdown

PAGE = ROOT / "docs" / "results.md"
IMAGES = ROOT / "docs" / "images"
_SECTION = re.compile(r"(<!-- begin (\S+) -->\n).*?(<!-- end \2 -->)", re.DOTALL)
Draw = Callable[[Path], None]


def conditions(data: dict[str, Any]) -> str:
    """What the rows of a file have in common, in a sentence."""
    header = data["header"]
    said = [f"Model `{header['model']}` in {header['dtype']}"]
    if calibration := header.get("calibration"):
        said.append(
            f"calibrated on {calibration['num_samples']} x {calibration['sequence_length']} tokens of "
            f"{calibration['source']}"
        )
    texts = ", ".join(f"{name} ({text['blocks']} blocks)" for name, text in header["texts"].items())
    said.append(f"evaluated on {texts}")
    for name in ("steps", "epochs"):
        if header.get(name) is not None:
            said.append(f"{name} {header[name]}")
    devices = dict.fromkeys(row["device"] for row in data["rows"])
    return f"{'; '.join(said)}. Device: {', '.join(devices)}.\n\n"


def quality(data: dict[str, Any]) -> dict[str, str]:
    """One section a text with the ratios, and one with all figures."""
    every = rows_of(data["rows"])
    found: dict[str, str] = {}
    for text in data["header"]["texts"]:
        rows = [row for row in every if row.text == text]
        found[f"ratios-{text}"] = conditions(data) + ratios_markdown(rows)
        found[f"details-{text}"] = details_markdown(rows)
    refused = {f"- `{_who(entry)}`: {entry['reason']}" for entry in data["refused"]}
    found["refused"] = "\n".join(sorted(refused)) + "\n" if refused else "Nothing.\n"
    return found


def _who(entry: dict[str, Any]) -> str:
    return ", ".join(str(value) for key, value in entry.items() if key not in ("reason", "seed"))


def ablation(data: dict[str, Any]) -> dict[str, str]:
    """One section a question: a line an answer, a column a budget and text."""
    texts = list(data["header"]["texts"])
    budgets = sorted({entry["kept_asked"] for entry in data["rows"]}, reverse=True)
    columns = [(budget, text) for budget in budgets for text in texts]
    found: dict[str, str] = {}
    for question, answers in ABLATIONS.items():
        lines: list[list[str]] = []
        for label, variant in answers.items():
            wanted = variant.labels()
            rows = rows_of([e for e in data["rows"] if all(e[k] == v for k, v in wanted.items())])
            if rows:
                lines.append([label, *(_cell(rows, *column) for column in columns), _kept(rows, budgets)])
        if not lines:
            continue
        head = ("", *(f"{100 * budget:g} %, {text}" for budget, text in columns), "kept")
        found[question] = conditions(data) + markdown(head, lines) + "\n"
    return found


def _cell(rows: list[ComparisonRow], budget: float, text: str) -> str:
    group = summarise(row for row in rows if row.kept_asked == budget and row.text == text)
    if not group:
        return ""
    spread = "" if group[0].spread is None else f" ± {group[0].spread:.3f}"
    return f"{group[0].row.ratio:.3f}{spread}"


def _kept(rows: list[ComparisonRow], budgets: list[float]) -> str:
    """Measured shares of bytes, which differ from the budget where one side alone is cut."""
    kept = {row.kept_asked: row.kept for row in rows}
    return ", ".join(f"{100 * kept[budget]:.1f} %" for budget in budgets if budget in kept)


def sections() -> tuple[dict[str, str], dict[Path, Draw]]:
    """Every section that has been measured, by its name in the page, and the plots to draw."""
    found: dict[str, str] = {}
    plots: dict[Path, Draw] = {}
    for path in sorted(RESULTS.glob("*.json")):
        kind, _, _ = path.stem.partition("-")
        if kind not in ("quality", "ablation", "promise", "nesting"):
            continue
        data = json.loads(path.read_text())
        if kind == "nesting":
            found[f"{path.stem}/table"] = nesting.section(data)
            continue
        if kind == "promise":
            image = IMAGES / f"{path.stem}.png"
            plots[image] = partial(promise.plot_promise, data)
            picture = f"![Increase on unseen text against the increase asked for](images/{image.name})"
            found[f"{path.stem}/table"] = f"{promise.section(data)}\n{picture}\n"
            continue
        made = quality(data) if kind == "quality" else ablation(data)
        found |= {f"{path.stem}/{name}": body for name, body in made.items()}
        if kind == "quality":
            for text in data["header"]["texts"]:
                rows = [row for row in rows_of(data["rows"]) if row.text == text]
                image = IMAGES / f"{path.stem}-{text}.png"
                plots[image] = partial(plot_quality, rows)
                found[f"{path.stem}/ratios-{text}"] += (
                    f"\n![Perplexity against cache bytes](images/{image.name})\n"
                )
    return found, plots


def fill(page: str, found: dict[str, str]) -> str:
    """The page with every section replaced; one that was not measured says so."""

    def body(match: re.Match[str]) -> str:
        return f"{match[1]}\n{found.get(match[2], 'Not measured yet.' + chr(10))}\n{match[3]}"

    return _SECTION.sub(body, page)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail where the page is stale")
    given = parser.parse_args()
    found, plots = sections()
    page = PAGE.read_text()
    filled = fill(page, found)
    if given.check:
        if filled != page:
            sys.exit("docs/results.md is stale: run python -m benchmarks.report")
        return
    PAGE.write_text(filled)
    for path, draw in plots.items():
        draw(path)


if __name__ == "__main__":
    main()
