"""The small tables of docs/results.md: one question each, taken from the result files that the appendix shows whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.ablation import ABLATIONS
from benchmarks.bench import rows_of
from orthokv.show.results import ComparisonRow, summarise
from orthokv.show.wording import markdown

MAIN, MIXED, SECOND = "quality-books-llama-31m", "quality-books-llama-31m-mixture", "quality-books-llama-29m"
ABLATION = "ablation-books-llama-31m"
TEXTS = {"books-eval": "books", "docs-eval": "documentation", "wikitext2-test": "WikiText-2"}
BUDGETS = (0.75, 0.5, 0.375, 0.25, 0.125)
Kind = tuple[str, str, str]  # method, sharing, key mode
DEFAULT: Kind = ("oblique", "joint", "pre")

# In the order of the page: as published, and as rows of the result files.
PUBLISHED: dict[str, Kind] = {
    "EigenAttention, as released": ("eigen", "tied", "pre"),
    "EigenAttention, the paper's [K;Q]": ("eigen (statistics=kq)", "head", "pre"),
    "K-SVD": ("eigen", "head", "pre"),
    "KQ-SVD": ("weighted", "head", "pre"),
    "StiefAttention": ("stiefel (predictor)", "tied", "pre"),
    "Palu": ("palu", "joint", "pre"),
    "**this library's default**": DEFAULT,
}
SIDES: dict[str, tuple[Kind, Kind]] = {
    "singular vectors": (("eigen", "joint", "pre"), ("eigen", "joint", "post")),
    "weighted": (("weighted", "joint", "pre"), ("weighted", "joint", "post")),
    "default, without polish": (
        ("oblique (polish_steps=0)", "joint", "pre"),
        ("oblique (polish_steps=0)", "joint", "post"),
    ),
}
SECOND_MODEL: dict[str, Kind] = {
    "EigenAttention, as released": ("eigen", "tied", "pre"),
    "StiefAttention": ("stiefel (predictor)", "tied", "pre"),
    "**this library's default**": DEFAULT,
}

# What is changed, the question of `benchmarks.ablation` and its answer; the first line is what the others are changed from.
INGREDIENTS = (
    ("nothing: `stiefel:joint`, from singular vectors, 64 blocks of books", "sharing", "joint"),
    ("each KV head has its own basis", "sharing", "head"),
    ("the paper's form: keys share a basis, values have one a head", "sharing", "tied"),
    ("the paper's predictor", "parameterisation", "joint, predictor"),
    ("a random start", "start", "joint, random"),
    ("a weighted start", "start", "joint, weighted"),
    ("fitted on compressed inputs", "inputs", "compressed to 25 %"),
    ("8 blocks of text", "samples", "8"),
    ("text that the model writes itself", "domain", "self"),
    ("a mixture of texts", "domain", "mixture"),
)


def answers(results: Path) -> dict[str, str]:
    """Every answer whose files are there, by the name of its section in the page."""
    tables: dict[str, tuple[tuple[str, ...], Callable[..., str]]] = {
        "cost": ((MAIN,), cost),
        "published": ((MAIN,), published),
        "domain": ((MAIN, MIXED), domain),
        "rotary": ((MAIN,), rotary),
        "second-model": ((SECOND,), second_model),
    }
    found: dict[str, str] = {}
    for name, (files, table) in tables.items():
        paths = [results / f"{file}.json" for file in files]
        if all(path.is_file() for path in paths):
            found[f"answers/{name}"] = table(
                *(rows_of(json.loads(path.read_text())["rows"]) for path in paths)
            )
    if (path := results / f"{ABLATION}.json").is_file():
        found["answers/ingredients"] = ingredients(json.loads(path.read_text())["rows"])
    return found


def ingredients(entries: list[dict[str, Any]]) -> str:
    """What the error becomes when one thing is changed."""
    columns = [(0.5, "books-eval"), *((0.25, text) for text in TEXTS)]
    lines: list[list[str]] = []
    for said, question, answer in INGREDIENTS:
        labels = ABLATIONS[question][answer].labels()
        rows = rows_of([e for e in entries if all(e[key] == value for key, value in labels.items())])
        chosen = [[row for row in rows if (row.kept_asked, row.text) == column] for column in columns]
        lines.append([said, *(f"{summarise(group)[0].row.ratio:.3f}" for group in chosen)])
    return _table(("changed", *(f"{_share(b)}, {TEXTS[text]}" for b, text in columns)), lines)


def cost(rows: list[ComparisonRow]) -> str:
    """The default method on every text and budget."""
    lines = [
        [said, *(ratio(rows, DEFAULT, budget, text) for budget in BUDGETS)] for text, said in TEXTS.items()
    ]
    return _table(("text", *map(_share, BUDGETS)), lines)


def published(rows: list[ComparisonRow]) -> str:
    return _methods(PUBLISHED, rows, BUDGETS, "books-eval")


def second_model(rows: list[ComparisonRow]) -> str:
    return _methods(SECOND_MODEL, rows, (0.5, 0.25), "books-eval")


def domain(books: list[ComparisonRow], mixture: list[ComparisonRow]) -> str:
    """The default method, calibrated on one text and on a mixture."""
    columns = [(budget, text) for budget in (0.5, 0.25) for text in TEXTS]
    lines = [
        [said, *(ratio(rows, DEFAULT, budget, text) for budget, text in columns)]
        for said, rows in (("books", books), ("books, WikiText-2 and the model's own text", mixture))
    ]
    return _table(("calibrated on", *(f"{_share(b)}, {TEXTS[text]}" for b, text in columns)), lines)


def rotary(rows: list[ComparisonRow]) -> str:
    """Keys cached before rotary embedding, and after it."""
    columns = [(budget, side) for budget in (0.5, 0.25) for side in (0, 1)]
    lines = [
        [said, *(ratio(rows, kinds[side], budget, "books-eval") for budget, side in columns)]
        for said, kinds in SIDES.items()
    ]
    return _table(("bases", *(f"{_share(b)}, {('before', 'after')[side]}" for b, side in columns)), lines)


def _methods(kinds: dict[str, Kind], rows: list[ComparisonRow], budgets: Iterable[float], text: str) -> str:
    budgets = tuple(budgets)
    lines = [[said, *(ratio(rows, kind, budget, text) for budget in budgets)] for said, kind in kinds.items()]
    return _table(("method", *map(_share, budgets)), lines)


def ratio(rows: list[ComparisonRow], kind: Kind, budget: float, text: str) -> str:
    """Perplexity over the uncompressed model's, the mean over seeds; by the knapsack."""
    wanted = [
        row
        for row in rows
        if (row.method, row.sharing, row.key_mode) == kind
        and (row.allocation, row.kept_asked, row.text) == ("knapsack", budget, text)
    ]
    (found,) = summarise(wanted)
    return f"{found.row.ratio:.3f}"


def _share(budget: float) -> str:
    return f"{100 * budget:g} %"


def _table(head: tuple[str, ...], lines: list[list[str]]) -> str:
    return markdown(head, lines) + "\n"
