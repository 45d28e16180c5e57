"""Where commands write to: tables and results on standard output, progress and warnings on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from rich.console import Console

from orthokv.show.progress import BarReporter, PlainReporter
from orthokv.show.wording import begin_at
from orthokv.spec.progress import Reporter

# Off a terminal (a pipe, a log) rich would cut tables at 80 columns; the widest has this many.
TABLE_COLUMNS = 140
out_console = Console(width=None if sys.stdout.isatty() else TABLE_COLUMNS)
err_console = Console(stderr=True)


@contextmanager
def reporter() -> Iterator[Reporter]:
    """A live bar in a terminal, plain lines otherwise; both on standard error."""
    if err_console.is_terminal:
        with BarReporter(err_console) as bar:
            yield bar
    else:
        yield PlainReporter()


def print_json(data: Any) -> None:
    sys.stdout.write(json.dumps(data, indent=2) + "\n")


def print_quality(measured: dict[str, Any]) -> None:
    ratio = measured["perplexity"] / measured["perplexity_dense"]
    out_console.print(
        f"perplexity {measured['perplexity']:.3f}, uncompressed {measured['perplexity_dense']:.3f} "
        f"([bold]{ratio:.3f} x[/bold]), KL {measured['kl']:.4f} nats over {measured['tokens']} tokens"
    )
    if where := begin_at(measured["dataset"]["starts"]):
        out_console.print(f"measured on {where}")
    out_console.print(
        f"live cache {measured['cache_bytes_per_token']:g} of {measured['cache_bytes_per_token_dense']:g} bytes a token "
        f"([bold]kept {100 * measured['kept']:.1f} %[/bold])"
    )
    if "tokens_per_second" in measured:
        out_console.print(
            f"decoding {measured['tokens_per_second']:.1f} tokens/s, uncompressed "
            f"{measured['tokens_per_second_dense']:.1f} ({measured['device']})"
        )


def stop(message: str, code: int) -> NoReturn:
    """One line on standard error, and the end with this exit code."""
    err_console.print(f"orthokv: {message}", markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)
