"""What a job would cost: the arithmetic, the fitted line and its band, models read without loading them, the answer."""

from __future__ import annotations

import asyncio
import io
import json
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import func, select

from app.artifacts.models import Artifact
from app.costs import priors
from app.costs.arithmetic import Asked, Shape, flop
from app.costs.models import RunCost
from app.costs.probe import NOTHING, Known, Unfit, ask_hub, read_folder
from app.costs.regression import MIN_RUNS, Run, predict
from app.infra.database import SyncDatabase
from app.infra.storage import Storage
from app.jobs.commits import Produced, commit_layer, finish_step
from app.jobs.schemas import JobCreate
from app.jobs.vocabulary import StepName
from app.main import create_app
from app.models import metadata
from app.principal import local_principal
from app.projects.schemas import Limits
from app.projects.service import set_limits
from app.settings import Settings
from orthokv.models.loading import read_geometry
from orthokv.models.source import resolve_model
from orthokv.spec.budget import Budget
from orthokv.spec.settings import FitSettings
from orthokv.spec.stored import stored_bytes
from orthokv.spec.target import Target
from tests.support.factories import job_body, must_claim, queue_job
from tests.support.hub import Hub, Repo, serve_hub
from tests.support.paths import DEMO, REPOSITORY
from tests.support.tenants import OWNER
from workers.orders import load_order, prepare
from workers.protocol import Error, File, Progress, Result, parse
from workers.runner import Wire, run


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serve_hub(monkeypatch, tmp_path / "hub") as hub:
        yield hub


RESULTS = REPOSITORY / "benchmarks" / "results"
BOOKS_31M = Shape(layers=5, hidden=768, heads=12, kv_heads=3, head_dim=64, parameters=31_367_424)
LLAMA_8B = Shape(layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, parameters=8_030_261_248)


def asked(method: str = "oblique", sharing: str = "joint", **changes: Any) -> Asked:
    learned = method in ("oblique", "stiefel")
    values: dict[str, Any] = {
        "samples": 64,
        "length": 1024,
        "steps": 200 if learned else 0,
        "refine_steps": 400 if method == "oblique" else 0,
        "polish_steps": 0,
        "writes_itself": False,
        "searches": False,
    }
    return Asked(method=method, sharing=sharing, **{**values, **changes})


def fit_and_profile(shape: Shape, request: Asked) -> float:
    return flop(shape, request, StepName.FIT) + flop(shape, request, StepName.PROFILE)


class TestLine:
    def test_it_finds_overhead_and_rate(self) -> None:
        runs = [Run(x, 5.0 + 2e-9 * x) for x in (1e9, 1e10, 1e11)]
        assert predict(runs, 0.0).likely == pytest.approx(5.0)
        assert predict(runs, 1e9).likely == pytest.approx(5.0 + 2.0)

    @pytest.mark.parametrize(
        "runs",
        [
            [Run(0.0, 3.0)] * 4,
            [Run(1e9, 9.0), Run(2e9, 4.0), Run(3e9, 1.0)],
            [Run(1e9, 0.001), Run(2e9, 4.0), Run(3e9, 12.0)],
        ],
    )
    def test_nothing_it_says_is_below_zero(self, runs: list[Run]) -> None:
        assert 0 <= predict(runs, 0.0).likely <= predict(runs, 5e9).likely
        band = predict(runs, 5e9)
        assert 0 < band.low <= band.likely <= band.high

    def test_few_runs_say_nothing(self) -> None:
        with pytest.raises(ValueError, match="too few"):
            predict([Run(1.0, 1.0)] * (MIN_RUNS - 1), 1.0)

    @pytest.mark.parametrize(("count", "least"), [(3, 0.4), (9, 0.7), (60, 0.85)])
    def test_the_band_holds_as_many_new_runs_as_it_says(self, count: int, least: float) -> None:
        """(n - 1) of n + 1, at most nine in ten; asked of sizes between and beyond those of the past."""
        chance = random.Random(count)

        def measured(flop: float) -> Run:
            return Run(flop, (4.0 + 1e-10 * flop) * chance.lognormvariate(0.0, 0.3))

        held = 0
        for _ in range(400):
            past = [measured(10 ** chance.uniform(9, 12)) for _ in range(count)]
            new = measured(10 ** chance.uniform(9, 12.3))
            band = predict(past, new.flop)
            held += band.low <= new.seconds <= band.high
        assert least <= held / 400 <= 0.98

    def test_a_noisy_worker_has_a_wider_band(self) -> None:
        steady = [Run(x * 1e9, 2.0 + x) for x in range(1, 9)]
        noisy = [Run(one.flop, one.seconds * (0.5 if i % 2 else 2.0)) for i, one in enumerate(steady)]
        narrow, wide = predict(steady, 5e9), predict(noisy, 5e9)
        assert narrow.high / narrow.low == pytest.approx(1.0)
        assert wide.high / wide.low > 3


class TestWork:
    @pytest.mark.parametrize(
        "more",
        [{"samples": 128}, {"length": 2048}, {"steps": 400}, {"refine_steps": 800}],
        ids=lambda more: next(iter(more)),
    )
    def test_more_of_anything_is_more_work(self, more: dict[str, int]) -> None:
        assert fit_and_profile(BOOKS_31M, asked(**more)) > fit_and_profile(BOOKS_31M, asked())

    def test_a_fit_is_paid_by_the_layer(self) -> None:
        whole = flop(BOOKS_31M, asked(), StepName.FIT)
        assert flop(BOOKS_31M, asked(), StepName.FIT, layers=1) == pytest.approx(whole / 5)

    def test_a_model_that_writes_its_text_and_a_budget_that_is_searched_cost(self) -> None:
        for step, field in ((StepName.CALIBRATE, "writes_itself"), (StepName.PACKAGE, "searches")):
            assert flop(BOOKS_31M, asked(), step) == 0
            assert flop(BOOKS_31M, asked(**{field: True}), step) > 0

    def test_a_step_of_a_polish_costs_what_one_of_the_last_stage_does(self) -> None:
        polish = flop(BOOKS_31M, asked(polish_steps=7), StepName.PACKAGE)
        some, more = (flop(BOOKS_31M, asked(refine_steps=n), StepName.PROFILE) for n in (400, 407))
        assert polish == pytest.approx(more - some)

    @pytest.mark.parametrize(
        ("method", "polish", "expected"),
        [({}, None, 200), ({}, 0, 0), ({"refine_steps": 31}, None, 15), ({"type": "eigen"}, None, 0)],
    )
    def test_a_request_is_polished_half_as_long_as_it_is_refined(
        self, method: dict[str, Any], polish: int | None, expected: int
    ) -> None:
        body = job_body(model=LOCAL, dataset={"source": "self"}, method=method, polish_steps=polish)
        assert Asked.of(JobCreate.model_validate(body)).polish_steps == expected


class TestPriors:
    """Each constant is what the named file gives."""

    def rates(self, file: str) -> list[float]:
        rows = json.loads((RESULTS / file).read_text())["rows"]
        return [
            self.work(row["method"], row["sharing"]) / row["seconds"]
            for row in rows
            if row["method"] in ("eigen", "weighted", "stiefel", "oblique") and row["key_mode"] == "pre"
        ]

    def work(self, method: str, sharing: str) -> float:
        """Of a row: the fit, and the polish of its plan where the method has one."""
        request = asked(method, sharing, polish_steps=200 if method == "oblique" else 0)
        return fit_and_profile(BOOKS_31M, request) + flop(BOOKS_31M, request, StepName.PACKAGE)

    def test_of_the_gpu(self) -> None:
        rates = self.rates("quality-books-llama-31m.json")
        assert len(rates) > 20
        assert (min(rates), max(rates)) == pytest.approx(priors.GPU_FLOP_PER_SECOND, rel=0.01)

    def test_of_the_cpu(self) -> None:
        measured = json.loads((RESULTS / "stream-8b-cpu.json").read_text())["seconds"]
        seconds = measured["fit_and_profile"] + measured["fingerprint_and_sensitivities"]
        streamed = fit_and_profile(LLAMA_8B, asked("weighted", samples=4, length=16)) / seconds
        fastest = max(self.rates("compare-books-llama-31m-cpu.json"))
        assert (streamed, fastest) == pytest.approx(priors.CPU_FLOP_PER_SECOND, rel=0.01)

    def test_of_a_start(self) -> None:
        measured = json.loads((RESULTS / "runner-start.json").read_text())
        assert (min(measured["seconds"]), max(measured["seconds"])) == priors.START_SECONDS
        assert max(measured["resident_kb"]) * 1000 == pytest.approx(priors.PROCESS_BYTES, rel=0.01)


def shard(**tensors: list[int]) -> bytes:
    header, offset = {}, 0
    for name, shape in tensors.items():
        size = 2
        for side in shape:
            size *= side
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(offset)


class TestReading:
    def folder(self, tmp_path: Path, **files: bytes) -> Path:
        config = (DEMO / "config.json").read_bytes()
        for name, content in {"config.json": config, "model.safetensors": shard(a=[3, 4]), **files}.items():
            (tmp_path / name).write_bytes(content)
        return tmp_path

    def test_the_demo_model(self) -> None:
        known = read_folder(DEMO)
        assert known.source == "files"
        assert known.shape == Shape(6, 192, 4, 2, 64, 3_443_136, 4096)
        assert known.weight_bytes == 2 * 3_443_136
        assert known.geometry == read_geometry(resolve_model(str(DEMO)))
        assert known.download_bytes == 0

    def test_a_folder_that_only_workers_have_is_unknown(self, tmp_path: Path) -> None:
        assert read_folder(tmp_path / "elsewhere") is NOTHING

    @pytest.mark.parametrize(
        ("files", "code"),
        [
            ({"config.json": b"{"}, "model_invalid"),
            ({"config.json": b"[]"}, "model_invalid"),
            ({"config.json": b"[" * 100_000}, "model_invalid"),
            ({"config.json": b" " * ((1 << 20) + 1)}, "model_invalid"),
            ({"model.safetensors": b"short"}, "model_invalid"),
            ({"model.safetensors": struct.pack("<Q", 1 << 60) + b"{}"}, "model_invalid"),
            ({"model.safetensors": struct.pack("<Q", 2) + b"[]"}, "model_invalid"),
            ({"model.safetensors": shard(a=[3, 4])[:-1]}, "model_invalid"),
            (
                {"model.safetensors": shard(a=[3, 4]).replace(b"[3, 4]", b"[3,-4]")},
                "model_invalid",
            ),
        ],
    )
    def test_what_no_worker_would_take(self, tmp_path: Path, files: dict[str, bytes], code: str) -> None:
        with pytest.raises(Unfit) as refused:
            read_folder(self.folder(tmp_path, **files))
        assert refused.value.code == code

    def test_pickles_are_not_looked_at(self, tmp_path: Path) -> None:
        folder = self.folder(tmp_path)
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        with pytest.raises(Unfit) as refused:
            read_folder(folder)
        assert refused.value.code == "model_unsafe_format"

    def test_a_configuration_without_a_shape_gives_sizes_alone(self, tmp_path: Path) -> None:
        config = json.dumps({"model_type": "llama"}).encode()
        known = read_folder(self.folder(tmp_path, **{"config.json": config}))
        assert (known.shape, known.weight_bytes) == (None, 24)

    @pytest.mark.parametrize(
        ("config", "code", "sentence"),
        [
            ({"model_type": "mamba"}, "model_unsupported", "'mamba' is not supported: its linear-attention"),
            ({"model_type": "llama", "hidden_size": 0}, "model_invalid", "hidden_size must be .*, not 0"),
        ],
    )
    def test_a_model_that_the_library_refuses_is_refused_in_its_words(
        self, tmp_path: Path, hub: Hub, config: dict[str, Any], code: str, sentence: str
    ) -> None:
        content = json.dumps(config).encode()
        with pytest.raises(Unfit, match=sentence) as refused:
            read_folder(self.folder(tmp_path, **{"config.json": content}))
        hub.repos["org/model"] = Repo({"config.json": content})
        of_hub = asyncio.run(ask_hub(hub.url, "org/model", None))
        assert isinstance(of_hub, Unfit)
        assert (refused.value.code, str(refused.value)) == (code, str(of_hub))

    def test_a_model_of_the_hub_is_known_by_its_configuration(self, hub: Hub) -> None:
        hub.repos["org/model"] = Repo({"config.json": (DEMO / "config.json").read_bytes()})
        known = asyncio.run(ask_hub(hub.url, "org/model", None))
        assert isinstance(known, Known)
        assert known.source == "config"
        assert known.shape is not None
        assert known.shape.parameters == pytest.approx(3_443_136, rel=0.01)  # norms are not counted

    def test_what_the_hub_does_not_give_is_unknown(self, hub: Hub) -> None:
        hub.repos["org/closed"] = Repo({"config.json": b"{}"}, gated=True)
        hub.repos["org/broken"] = Repo({"config.json": b"{"})
        hub.repos["org/endless"] = Repo({"config.json": b" " * (2 << 20)})
        for name in ("org/none", "org/closed", "org/broken", "org/endless"):
            assert asyncio.run(ask_hub(hub.url, name, None)) is NOTHING, name
        assert asyncio.run(ask_hub("http://127.0.0.1:9", "org/model", None)) is NOTHING


def rows(database: SyncDatabase) -> dict[str, int]:
    def count(session: Any) -> dict[str, int]:
        return {
            name: session.execute(select(func.count()).select_from(table)).scalar_one()
            for name, table in metadata.tables.items()
        }

    return database.read(count)


LOCAL = {"id": str(DEMO)}


class TestValidate:
    def test_it_says_what_a_job_would_take_and_stores_nothing(
        self, client: TestClient, database: SyncDatabase
    ) -> None:
        before = rows(database)
        answer = client.post("/v1/jobs:validate", json=job_body(model=LOCAL))
        assert answer.status_code == 200
        assert rows(database) == before
        found = answer.json()
        assert (found["valid"], found["problems"]) == (True, [])
        estimate = found["estimate"]
        assert (estimate["tokens"], estimate["layers"], estimate["known_from"]) == (256, 6, "files")
        assert estimate["basis"] == f"priors: {priors.MEASURED_ON}"
        assert 0 < estimate["minutes"]["low"] < estimate["minutes"]["likely"] < estimate["minutes"]["high"]

    def test_files_are_told_to_be_as_large_as_the_job_leaves_them(self, client: TestClient) -> None:
        geometry = read_geometry(resolve_model(str(DEMO)))
        settings = FitSettings("weighted", num_samples=4, sequence_length=64)
        left = stored_bytes(geometry, settings, Target(Budget("kept", 0.25))).total
        copied = sum(path.stat().st_size for path in DEMO.iterdir())
        for form, bytes_ in (("adapter", left), ("full", left + copied)):
            method = {"type": "weighted"}
            dataset = {"source": "self", "num_samples": 4, "sequence_length": 64}
            body = job_body(model=LOCAL, method=method, dataset=dataset, form=form)
            estimate = client.post("/v1/jobs:validate", json=body).json()["estimate"]
            assert estimate["artifact_bytes"] == bytes_, form

    @pytest.mark.parametrize(
        ("changes", "code", "sentence"),
        [
            ({"method": {"sharing": "quad"}}, "invalid_setting", "groups of 4 KV heads"),
            ({"budget": {"metric": "kept", "value": 0.01}}, "budget_unreachable", "kept 0.01 cannot be met"),
        ],
    )
    def test_what_no_fit_of_this_model_could_serve_is_refused(
        self, client: TestClient, changes: dict[str, Any], code: str, sentence: str
    ) -> None:
        found = client.post("/v1/jobs:validate", json=job_body(model=LOCAL, **changes)).json()
        (problem,) = found["problems"]
        assert problem["code"] == code
        assert sentence in problem["detail"]
        assert found["estimate"]["basis"] == "unknown: the job cannot be done"

    def test_every_refusal_is_named_at_once(self, client: TestClient, database: SyncDatabase) -> None:
        database.write(
            set_limits,
            project_id=local_principal().project_id,
            limits=Limits(queued_jobs=0),
            principal=local_principal(),
        )
        made = client.post("/v1/datasets", json={"filename": "a.txt"}).json()
        dataset = {"id": made["id"], "also": [{"id": "ds_" + "0" * 26}]}
        body = job_body(model={"id": "not/a/model"}, dataset=dataset, gpu_class="h100")
        found = client.post("/v1/jobs:validate", json=body).json()
        assert not found["valid"]
        assert [problem["code"] for problem in found["problems"]] == [
            "invalid_request",
            "invalid_request",
            "dataset_not_ready",
            "not_found",
            "queue_full",
        ]
        assert found["problems"][1]["errors"][0]["pointer"] == "/gpu_class"

    def test_an_owner_is_told_what_a_folder_holds(self, client: TestClient, tmp_path: Path) -> None:
        found = client.post("/v1/jobs:validate", json=job_body(model={"id": str(tmp_path)})).json()
        (problem,) = found["problems"]
        assert problem["code"] == "model_invalid"
        assert found["estimate"]["minutes"] is None

    def test_an_unknown_model_is_no_problem(self, settings: Settings) -> None:
        with TestClient(create_app(settings.model_copy(update={"hub_url": ""})), headers=OWNER) as client:
            found = client.post("/v1/jobs:validate", json=job_body()).json()
        assert found["valid"]
        assert found["estimate"]["known_from"] == "nothing"
        assert found["estimate"]["basis"].startswith("unknown")

    def test_a_body_that_fits_no_schema_is_refused_as_ever(self, client: TestClient) -> None:
        assert client.post("/v1/jobs:validate", json={}).status_code == 422


def run_job(
    database: SyncDatabase, storage: Storage, settings: Settings, folder: Path, **dataset: Any
) -> str:
    """A true job on the demo model, its steps run by the runner's own functions in this process."""
    method = {"steps": 5, "refine_steps": 5}
    body = {"source": "self", **dataset}
    job = queue_job(database, model=LOCAL, dataset=body, method=method)
    for number in range(6):
        lease = must_claim(database)
        order = database.read(load_order, lease, settings)
        request = prepare(order, lease, storage, settings, folder / f"{job.id}-{number}")
        said = io.StringIO()
        assert run(request, Wire(said)) == 0, said.getvalue()
        files: list[Produced] = []
        data: dict[str, Any] = {}
        for line in said.getvalue().splitlines():
            match parse(line.encode()):
                case File() as file:
                    key = f"jobs/{job.id}/{lease.step_id}/{lease.fence}/{file.name}"
                    stored = storage.put_file(key, Path(file.path))
                    made = Produced(
                        file.name, key, stored.bytes, stored.sha256, file.media_type, file.layer, file.metrics
                    )
                    if file.layer is None:
                        files.append(made)
                    else:
                        database.write(commit_layer, lease, made)
                case Result() as result:
                    data = result.data
                case Progress() | Error():
                    pass
        database.write(finish_step, lease, files=files, data=data, layers_per_fit_step=None)
    return job.id


def seconds_of(database: SyncDatabase) -> list[float]:
    """Seconds of each job so far, as its steps noted them."""

    def read(session: Any) -> list[float]:
        noted = list(session.execute(select(RunCost.seconds).order_by(RunCost.id)).scalars())
        return [sum(noted[start : start + 6]) for start in range(0, len(noted), 6)]

    return database.read(read)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize(("polish", "basis"), [(None, "priors: "), (0, "fitted to 3 past runs")])
def test_runs_without_a_polish_foretell_none_with_one(
    database: SyncDatabase, settings: Settings, polish: int | None, basis: str
) -> None:
    def noted(session: Any) -> None:
        for number in range(3):
            for step in StepName:
                work = 0.0 if step is StepName.PACKAGE else 1e9 * (number + 1)
                key = f"cost_{step}{number}"
                session.add(
                    RunCost(id=key, gpu_class="default", method="oblique", step=step, flop=work, seconds=2.0)
                )

    database.write(noted)
    with TestClient(create_app(settings), headers=OWNER) as client:
        body = job_body(model=LOCAL, dataset={"source": "self"}, polish_steps=polish)
        assert client.post("/v1/jobs:validate", json=body).json()["estimate"]["basis"].startswith(basis)


@pytest.mark.slow
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_past_runs_foretell_a_size_that_was_never_run(
    database: SyncDatabase, storage: Storage, settings: Settings, tmp_path: Path
) -> None:
    """Four jobs of the demo model, of four sizes; then three of a fifth, of which the middle one is in the band."""
    unseen = {"num_samples": 6, "sequence_length": 96}
    body = job_body(model=LOCAL, dataset={"source": "self", **unseen}, method={"steps": 5, "refine_steps": 5})
    for samples, length in ((2, 64), (8, 128), (4, 96), (12, 64)):
        run_job(database, storage, settings, tmp_path, num_samples=samples, sequence_length=length)
    with TestClient(create_app(settings), headers=OWNER) as client:
        estimate = client.post("/v1/jobs:validate", json=body).json()["estimate"]
    assert estimate["basis"] == "fitted to 4 past runs"
    jobs = [run_job(database, storage, settings, tmp_path, **unseen) for _ in range(3)]
    low, likely, high = (estimate["minutes"][name] * 60 for name in ("low", "likely", "high"))
    middle = sorted(seconds_of(database)[-3:])[1]
    assert low <= middle <= high
    assert high / low < 6, "a band that says something"
    assert low <= likely <= high
    size = select(func.sum(Artifact.bytes)).where(Artifact.job_id == jobs[0])
    stored = database.read(lambda session: session.execute(size).scalar_one())
    assert estimate["artifact_bytes"] == pytest.approx(stored, rel=0.02)
