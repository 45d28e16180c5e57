"""A real server's metrics and logs, and whether the dashboard and the alert rules speak of what is there."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import Metric

from app.settings import Settings
from tests.support.factories import Script, job_body
from tests.support.orthokv_server import Server, until
from tests.support.paths import REPOSITORY, SCRIPTED_RUNNER
from tests.support.scrape import json_lines, ports, scrape

MONITORING = REPOSITORY / "deploy" / "monitoring"
COMPOSE: dict[str, Any] = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((MONITORING / "rules.yml").read_text())["groups"]
    for rule in group["rules"]
]
DASHBOARD: dict[str, Any] = json.loads((MONITORING / "grafana" / "dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = {rule["alert"]: rule["expr"] for rule in RULES} | {
    f"{panel['title']} {target['refId']}": target["expr"] for panel in PANELS for target in panel["targets"]
}
# Made by Prometheus itself for each scrape.
OF_PROMETHEUS = {"up": {"job", "instance"}}
ADDED_BY_PROMETHEUS = {"job", "instance"}
_NAME = re.compile(r"\b((?:orthokv|process)_[a-z_]+|up)\b(?:\{([^}]*)\})?")
_STRING = re.compile(r'"[^"]*"')
_SELECTED = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)")
_GROUPED = re.compile(r"\bby\s*\(([^)]*)\)")


@dataclass(frozen=True)
class Seen:
    """What a server and its worker showed after a job, and what they logged."""

    metrics: list[Metric]
    log: list[dict[str, Any]]
    job_id: str
    request_id: str


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    folder = tmp_path_factory.mktemp("monitoring")
    script = Script(folder / "script")
    script.write({"step": "fit", "run": 0, "do": "chatter"}, {"step": "evaluate", "run": 0, "do": "die"})
    environment = {
        "ORTHOKV_RUNNER_COMMAND": json.dumps([sys.executable, str(SCRIPTED_RUNNER), str(script.folder)]),
        "ORTHOKV_METRICS_PORT": "0",
        "ORTHOKV_WORKER_METRICS_PORT": "0",
        "ORTHOKV_RETRY_BACKOFF_SECONDS": "0.05",
    }
    with Server(folder / "data", environment) as server:
        job_id = server.post("/v1/jobs", job_body())["id"]
        server.wait_for_end(job_id)
        server.get(f"/v1/jobs/{job_id}", wait=0)
        until(lambda: len(ports(server.log_file)) == 2, "both processes show metrics")
        metrics = [metric for port in ports(server.log_file) for metric in scrape(port)]
        log = json_lines(server.log_file)
    posted = next(line for line in log if line["event"] == "job.created")
    return Seen(metrics, log, job_id, posted["request_id"])


def labels_of(metrics: list[Metric]) -> dict[str, set[str]]:
    """The labels of each name that a query may use."""
    found: dict[str, set[str]] = {}
    for metric in metrics:
        for sample in metric.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_every_metric_and_label_of_dashboard_and_rules_is_there(seen: Seen, name: str) -> None:
    expression = EXPRESSIONS[name]
    known = labels_of(seen.metrics) | OF_PROMETHEUS
    named = _NAME.findall(expression)
    assert named, "it asks for no metric"
    shared: set[str] = set()
    for metric, selector in named:
        assert metric in known, f"{metric} is shown by no process"
        labels = known[metric] | ADDED_BY_PROMETHEUS
        assert set(_SELECTED.findall(_STRING.sub('""', selector))) <= labels, metric
        shared |= labels
    for group in _GROUPED.findall(expression):
        assert {label.strip() for label in group.split(",")} <= shared


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_what_several_processes_tell_of_one_database_is_not_added_up(name: str) -> None:
    stored = r"orthokv_(?:jobs_stored|queue_\w+|webhooks_\w+|steps_running|leases_overdue|database_\w+)"
    bare = re.sub(r"\bby \([^)]*\) ?", "", EXPRESSIONS[name])
    for match in re.finditer(stored, bare):
        assert bare[: match.start()].rstrip(" (").endswith(("max", "min")), match[0]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_says_how_bad_it_is_and_what_to_do(rule: dict[str, Any]) -> None:
    assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
    assert rule["alert"].startswith("OrthoKV")
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert re.fullmatch(r"\d+[smh]", rule.get("for", "1m"))
    file, _, anchor = rule["annotations"]["runbook"].partition("#")
    titles = re.findall(r"^#+ (.+)$", (REPOSITORY / file).read_text(), re.MULTILINE)
    assert anchor in [title.lower().replace(" ", "-") for title in titles]
    assert rule["annotations"]["summary"]
    for opening, closing in ("()", "{}", "[]"):
        assert rule["expr"].count(opening) == rule["expr"].count(closing)


def test_alerts_have_names_of_their_own() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES)


def test_panels_are_told_apart_and_do_not_overlap() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & cells, panel["title"]
        taken |= cells
    assert all(panel["description"] for panel in PANELS)


def test_prometheus_and_the_pod_monitors_scrape_the_ports_that_are_shown() -> None:
    port = int(COMPOSE["services"]["api"]["environment"]["ORTHOKV_METRICS_PORT"])
    scraped = yaml.safe_load((MONITORING / "prometheus.yml").read_text())["scrape_configs"]
    jobs = {one["job_name"]: one["dns_sd_configs"][0] for one in scraped}
    assert set(jobs) == {"orthokv-api", "orthokv-worker"}
    assert all(one["port"] == port for one in jobs.values())
    assert {name for one in jobs.values() for name in one["names"]} <= set(COMPOSE["services"])
    kubernetes = REPOSITORY / "deploy" / "kubernetes"
    pods = {
        one["metadata"]["name"]: one["spec"]["template"]
        for file in ("api.yaml", "worker.yaml")
        for one in yaml.safe_load_all((kubernetes / file).read_text())
        if one["kind"] == "Deployment"
    }
    monitors = [
        one
        for one in yaml.safe_load_all((MONITORING / "podmonitor.yaml").read_text())
        if one["kind"] == "PodMonitor"
    ]
    shown = yaml.safe_load((kubernetes / "settings.yaml").read_text())["data"]
    for one in monitors:
        pod = pods[one["metadata"]["name"]]
        assert pod["metadata"]["labels"] == one["spec"]["selector"]["matchLabels"]
        (endpoint,) = one["spec"]["podMetricsEndpoints"]
        container_ports = {p["name"]: p["containerPort"] for p in pod["spec"]["containers"][0]["ports"]}
        number = str(container_ports[endpoint["port"]])
        assert number == shown["ORTHOKV_METRICS_PORT"] == shown["ORTHOKV_WORKER_METRICS_PORT"]


def test_files_that_compose_mounts_exist() -> None:
    for name in ("prometheus", "grafana"):
        for volume in COMPOSE["services"][name]["volumes"]:
            if volume.startswith("./"):
                source, _, mode = volume.split(":")
                assert (REPOSITORY / source).is_file()
                assert mode == "ro"


def test_metrics_hold_no_id_and_no_path(seen: Seen) -> None:
    values = {
        value for metric in seen.metrics for sample in metric.samples for value in sample.labels.values()
    }
    assert not [value for value in values if re.search(r"[a-z]+_[0-9a-hjkmnp-tv-z]{26}", value)]
    assert not [value for value in values if str(REPOSITORY) in value or "org/model" in value]


def test_every_line_of_the_log_is_json_and_has_a_time_and_a_level(seen: Seen) -> None:
    for line in seen.log:
        assert {"event", "timestamp", "level"} <= set(line), line


def test_lines_of_a_request_have_its_id(seen: Seen) -> None:
    of_request = [line for line in seen.log if line.get("request_id") == seen.request_id]
    assert [line["event"] for line in of_request] == ["job.created", "request.answered"]
    created, answered = of_request
    assert created["job_id"] == seen.job_id
    assert (answered["method"], answered["route"], answered["status"]) == ("POST", "/v1/jobs", 201)
    gets = [line for line in seen.log if line.get("route") == "/v1/jobs/{job_id}"]
    assert {line["job_id"] for line in gets} == {seen.job_id}


def test_lines_of_a_worker_and_of_its_child_have_job_step_and_attempt(seen: Seen) -> None:
    of_worker = [line for line in seen.log if line["event"].startswith(("attempt.", "layer.", "child."))]
    assert {line["job_id"] for line in of_worker} == {seen.job_id}
    ended = [(line["step"], line["attempt"]) for line in of_worker if line["event"] == "attempt.succeeded"]
    assert ended == [
        ("resolve", 1),
        ("calibrate", 1),
        ("fit", 1),
        ("profile", 1),
        ("package", 1),
        ("evaluate", 2),
    ]
    said = [line for line in of_worker if line["event"] == "child.said"]
    assert [(line["step"], line["attempt"], line["line"]) for line in said] == [("fit", 1, "Loading weights")]


def test_requests_are_not_logged_where_that_is_turned_off(tmp_path: Path) -> None:
    with Server(tmp_path / "data", {"ORTHOKV_LOG_REQUESTS": "false"}) as server:
        server.get("/v1/jobs")
        assert Settings().log_requests
    assert "request.answered" not in [line["event"] for line in json_lines(server.log_file)]
