"""What MLflow is told of a job; and bad input of `orthokv mlflow-export`, for which no MLflow is needed."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from app.mlflow_export.cli import mlflow_export
from app.mlflow_export.record import Metric, model_name, record_of

JOB: dict[str, Any] = {
    "id": "job_1",
    "kind": "compress",
    "status": "succeeded",
    "attempt": 1,
    "version": 7,
    "spec": {"model": {"id": "org/name", "revision": None}, "dataset": {"also": [{"id": "ds_2"}]}, "seed": 3},
    "resolved": {
        "model": {"id": "org/name", "revision": "abc", "digest": "f0"},
        "dataset": {"digest": "d0", "num_samples": 4},
        "geometry": {"layers": 2},
    },
    "result": {
        "profile_id": "prof_1",
        "checkpoint_id": "ckpt_1",
        "plan": {"kept": 0.25, "allocation": "knapsack", "ranks": [{"key": 3, "value": 5}]},
        "measured": {"perplexity": 9.5, "layer_error": [0.1, 0.2], "device": "cpu", "exact": True},
    },
    "error": None,
    "metadata": {"team": "search"},
    "created_at": "2026-01-01T00:00:00Z",
    "started_at": "2026-01-01T00:00:01.500000Z",
    "finished_at": "2026-01-01T00:00:09Z",
}
LAYERS: list[dict[str, Any]] = [
    {"layer": n, "metrics": {"error": n / 10, "note": "x"}, "committed_at": f"2026-01-01T00:00:0{n}Z"}
    for n in range(2)
]
START = 1767225600000


def record(**changes: Any) -> Any:
    return record_of({**JOB, **changes}, LAYERS, manifest="m0", public_url="https://kv.example.com")


def test_params_are_the_spec() -> None:
    assert record().params == {"model.id": "org/name", "dataset.also.0.id": "ds_2", "seed": "3"}


def test_metrics_are_numbers_by_layer() -> None:
    end = START + 9000
    assert record().metrics == [
        Metric("layer.error", 0.0, START, 0),
        Metric("layer.error", 0.1, START + 1000, 1),
        Metric("measured.perplexity", 9.5, end, 0),
        Metric("measured.layer_error", 0.1, end, 0),
        Metric("measured.layer_error", 0.2, end, 1),
        Metric("plan.kept", 0.25, end, 0),
        Metric("plan.ranks.key", 3.0, end, 0),
        Metric("plan.ranks.value", 5.0, end, 0),
    ]


def test_tags_are_ids_and_digests() -> None:
    tags = record().tags
    assert tags["orthokv.job_id"] == "job_1"
    assert tags["orthokv.url"] == "https://kv.example.com/v1/jobs/job_1"
    assert (tags["orthokv.model.digest"], tags["orthokv.dataset.digest"]) == ("f0", "d0")
    assert (tags["orthokv.checkpoint_id"], tags["orthokv.manifest_sha256"]) == ("ckpt_1", "m0")
    assert tags["orthokv.metadata.team"] == "search"
    assert "orthokv.error" not in tags
    assert not any(key.startswith("orthokv.models.geometry") for key in tags)


@pytest.mark.parametrize(
    ("status", "shown"), [("succeeded", "FINISHED"), ("failed", "FAILED"), ("cancelled", "KILLED")]
)
def test_the_status_is_mlflows_word(status: str, shown: str) -> None:
    made = record(status=status)
    assert (made.status, made.start_time, made.end_time) == (shown, START + 1500, START + 9000)


def test_a_job_that_made_nothing_is_a_record_too() -> None:
    made = record(
        status="failed", result=None, resolved={}, started_at=None, error={"code": "model_not_found"}
    )
    assert made.start_time == START
    assert made.tags["orthokv.error"] == "model_not_found"
    assert {metric.key for metric in made.metrics} == {"layer.error"}


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("org/name", "org--name-orthokv"),
        ("gpt2", "gpt2-orthokv"),
        ("/srv/models/my llama/", "my--llama-orthokv"),
    ],
)
def test_the_registered_model_is_named_after_its_base(model: str, name: str) -> None:
    assert model_name({**JOB, "resolved": {"model": {"id": model}}}) == name


# --------------------------------------------------------------------------------------------- bad input


def export(*arguments: str, **environment: str) -> Result:
    app = typer.Typer()
    app.command()(mlflow_export)
    return CliRunner().invoke(app, list(arguments), env=environment)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tracking-uri", "sqlite:///x"], "--tracking-uri must be the http(s) URL of an MLflow server"),
        (["--tracking-uri", "http://x", "--model-name", "a/b"], "--model-name must be letters"),
        (["--tracking-uri", "http://x", "--alias", "it's"], "--alias must be letters"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str) -> None:
    result = export(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"orthokv: {message}")
    assert result.stderr.count("\n") == 1


def test_without_mlflow_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n == "mlflow" or n.startswith("mlflow.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "app.mlflow_export.export", raising=False)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    result = export(ORTHOKV_MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert result.exit_code == 2
    assert "mlflow-export needs pip install 'orthokv[mlflow]'" in result.stderr
