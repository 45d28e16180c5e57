"""Tables and plots of docs/results.md and all of its appendix, from the result files: `python -m benchmarks.report [--check]`.

In docs/results.md a table stands between `<!-- begin NAME -->` and `<!-- end NAME -->`; what is between them is never written
by hand. docs/results-appendix.md is written whole.
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
from benchmarks.answers import MAIN, MIXED, SECOND, answers
from benchmarks.bench import RESULTS, ROOT, rows_of
from benchmarks.quality import plot_quality
from orthokv.show.results import ComparisonRow, summarise
from orthokv.show.tables import details_markdown, ratios_markdown
from orthokv.show.wording import markdown

PAGE = ROOT / "docs" / "results.md"
APPENDIX = ROOT / "docs" / "results-appendix.md"
IMAGES = ROOT / "docs" / "images"
_SECTION = re.compile(r"(<!-- begin (\S+) -->\n).*?(<!-- end \2 -->)", re.DOTALL)
Draw = Callable[[Path], None]

TITLES = {
    MAIN: "books-llama-31m, calibrated on books",
    MIXED: "books-llama-31m, calibrated on a mixture",
    SECOND: "books-llama-29m, calibrated on books",
}
QUESTIONS = {
    "parameterisation": ("Predictor or direct", ""),
    "start": ("Warm start or none", ""),
    "sharing": ("Which heads share a basis", ""),
    "side": (
        "Keys only, values only",
        "The cut side keeps the budget's share of its width in every layer, the other all of it; the last column says what the "
        "cache then holds.",
    ),
    "nesting": (
        "One fit for all ranks, or one rank alone",
        "The same share of the width in every layer, for keys and values.",
    ),
    "inputs": (
        "Calibration on uncompressed or on compressed inputs",
        "With `propagate`, each layer is fitted on what the layers before it produce when cut to a share of their widths. "
        "Layers must then be fitted in order, by one worker.",
    ),
    "samples": ("Number of calibration blocks", ""),
    "length": (
        "Length of calibration blocks, at equal tokens",
        "Evaluated on blocks of 1024 tokens whatever the calibration's length.",
    ),
    "domain": ("Domain of calibration against domain of evaluation", ""),
}
_HEAD = """\
# Results, in full

Written by `python -m benchmarks.report` from the files in `benchmarks/results/`. What the tables say, how they were measured
and what the methods are called elsewhere: [results](results.md).
"""


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
    for question, variants in ABLATIONS.items():
        lines: list[list[str]] = []
        for label, variant in variants.items():
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
    found = answers(RESULTS)
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


def appendix(found: dict[str, str]) -> str:
    """Every table of every method and of every ablation."""
    parts = [_HEAD]
    stems = list(dict.fromkeys(name.partition("/")[0] for name in found))
    for stem in [*TITLES, *(stem for stem in stems if stem not in TITLES)]:
        names = [name.partition("/")[2] for name in found if name.startswith(f"{stem}/")]
        sections = {name: found[f"{stem}/{name}"] for name in names}
        if stem.startswith("quality-"):
            parts += [f"## {TITLES.get(stem, stem)}\n", *_quality_part(sections)]
        elif stem.startswith("ablation-"):
            about = "One thing is changed at a time from `stiefel:joint`, optimised directly from the singular vectors."
            parts += [f"## What each ingredient is worth: {stem.partition('-')[2]}\n", f"{about}\n"]
            parts += _ablation_part(sections)
    return "\n".join(parts)


def _quality_part(sections: dict[str, str]) -> list[str]:
    parts: list[str] = []
    for name, body in sections.items():
        kind, _, text = name.partition("-")
        if kind == "ratios":
            parts += [f"### Evaluated on {text}\n", body]
        elif kind == "details":
            parts += ["<details><summary>All figures</summary>\n", body, "</details>\n"]
        else:
            parts += ["### Not measured, and why\n", body]
    return parts


def _ablation_part(sections: dict[str, str]) -> list[str]:
    parts: list[str] = []
    for name, body in sections.items():
        title, note = QUESTIONS[name]
        parts += [f"### {title}\n", *([f"{note}\n"] if note else []), body]
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail where the page is stale")
    given = parser.parse_args()
    found, plots = sections()
    wanted = {PAGE: fill(PAGE.read_text(), found), APPENDIX: appendix(found)}
    stale = [path for path, text in wanted.items() if not path.is_file() or path.read_text() != text]
    if given.check:
        if stale:
            sys.exit(f"{stale[0].relative_to(ROOT)} is stale: run python -m benchmarks.report")
        return
    for path in stale:
        path.write_text(wanted[path])
    for path, draw in plots.items():
        draw(path)


if __name__ == "__main__":
    main()
