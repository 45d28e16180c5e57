"""Reading metrics as Prometheus does, and what a server's log says of where they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx2
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from app.infra.counted import REGISTRY


def counted(name: str, **labels: str) -> float:
    """A sample of this process; 0 before it is first counted."""
    return REGISTRY.get_sample_value(name, labels) or 0.0


def scrape(port: int) -> list[Metric]:
    response = httpx2.get(f"http://127.0.0.1:{port}/metrics", timeout=30)
    response.raise_for_status()
    return list(text_string_to_metric_families(response.text))


def values(metrics: list[Metric], name: str) -> dict[tuple[str, ...], float]:
    """Samples of a name by the values of their labels, in the order of the labels' names."""
    return {
        tuple(sample.labels[label] for label in sorted(sample.labels)): sample.value
        for metric in metrics
        for sample in metric.samples
        if sample.name == name
    }


def json_lines(log: Path) -> list[dict[str, Any]]:
    """A log, of which every line has to be a JSON object."""
    return [json.loads(line) for line in log.read_text().splitlines()]


def ports(log: Path) -> list[int]:
    """The ports on which the processes of a log show their metrics, in the order in which they began to."""
    return [line["port"] for line in json_lines(log) if line["event"] == "metrics.shown"]
