"""Which folders of the machine a job may name, by whom, and what nobody is told of the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from huggingface_hub import constants
from pydantic import ValidationError

from app.infra.database import SyncDatabase
from app.infra.storage import Storage
from app.jobs import service
from app.jobs.model_folders import OUTSIDE, WEIGHTS, FolderRefused, require
from app.jobs.schemas import JobCreate
from app.jobs.vocabulary import StepName
from app.main import create_app
from app.principal import DEFAULT_PROJECT_ID, local_principal
from app.settings import Settings
from orthokv.models.source import resolve_model
from orthokv.spec.errors import ModelNotFound
from tests.service.workers.test_supervisor import running, until
from tests.support.factories import Script, advance, finish, job_body, must_claim, queue_job, read_job
from tests.support.tenants import OWNER, bearer, new_key, new_project, principal_of
from workers.orders import load_order, prepare


@pytest.fixture
def roots(tmp_path: Path) -> Path:
    """A listed folder with a model in it, beside one that is not listed."""
    for folder in ("listed/model", "listed-not/model", "private/model"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text('{"hidden_size": 64}')
    return tmp_path


def leads_out(roots: Path) -> dict[str, str]:
    """Ways from a listed folder to another one."""
    listed = roots / "listed"
    (listed / "link").symlink_to(roots / "private" / "model")
    (listed / "chain").symlink_to(listed / "link")
    (listed / "dangling").symlink_to(roots / "private" / "nothing")
    (listed / "parts").mkdir()
    (listed / "parts" / "config.json").symlink_to(roots / "private" / "model" / "config.json")
    return {
        "a link": f"{listed}/link",
        "a link to a link": f"{listed}/chain",
        "a link to nothing": f"{listed}/dangling",
        "below a link": f"{listed}/link/model",
        "a model of links": f"{listed}/parts",
        "dots": f"{listed}/../private/model",
        "dots that come back": f"{listed}/../listed/model",
        "another folder": f"{roots}/private/model",
        "a folder whose name begins alike": f"{roots}/listed-not/model",
        "a folder that is not there": f"{roots}/private/nothing",
        "the folder above": str(roots),
        "two slashes": f"/{listed}/model",
    }


class TestTheRule:
    def test_whatever_leads_out_is_refused_in_the_same_words(self, roots: Path) -> None:
        for name, folder in leads_out(roots).items():
            with pytest.raises(FolderRefused) as refused:
                require(folder, form="adapter", by_owner=False, roots=[roots / "listed"])
            assert str(refused.value) == OUTSIDE, name

    @pytest.mark.parametrize("below", ["model", "", "model/", "./model", "not-there"])
    def test_what_is_below_a_listed_folder_is_not(self, roots: Path, below: str) -> None:
        require(f"{roots}/listed/{below}", form="adapter", by_owner=False, roots=[roots / "listed"])

    def test_a_listed_folder_may_itself_be_a_link(self, roots: Path) -> None:
        (roots / "models").symlink_to(roots / "listed")
        for name in ("models", "listed"):  # as it was listed, and as a client that follows links names it
            require(f"{roots}/{name}/model", form="adapter", by_owner=False, roots=[roots / "models"])

    def test_the_weights_of_a_listed_folder_are_the_owners_alone(self, roots: Path) -> None:
        model = f"{roots}/listed/model"
        with pytest.raises(FolderRefused) as refused:
            require(model, form="full", by_owner=False, roots=[roots / "listed"])
        assert str(refused.value) == WEIGHTS

    def test_an_owner_may_name_everything_and_anybody_the_hub(self, roots: Path) -> None:
        for folder in leads_out(roots).values():
            require(folder, form="full", by_owner=True, roots=[])
        require("org/model", form="full", by_owner=False, roots=[])

    @pytest.mark.parametrize("root", ["models", "/srv/../etc", "./x"])
    def test_a_listed_folder_has_to_be_plain(self, root: str) -> None:
        with pytest.raises(ValidationError, match="must be absolute folders"):
            Settings(model_roots=(Path(root),))

    def test_a_hub_id_is_never_a_folder_of_the_workers(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "org" / "model").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(ModelNotFound, match="the hub cannot be reached for org/model"):
            resolve_model("org/model", folders=False, cache_dir=tmp_path / "cache")


class TestTheApi:
    @pytest.fixture
    def listing(self, settings: Settings, roots: Path) -> Settings:
        return settings.model_copy(update={"model_roots": (roots / "listed",)})

    def ask(self, client: TestClient, path: str, model: str, **more: Any) -> Any:
        return client.post(path, json=job_body(model={"id": model}, **more))

    def test_a_key_reaches_no_folder_outside_of_the_listed_ones(
        self, listing: Settings, database: SyncDatabase, roots: Path
    ) -> None:
        key = new_key(database, new_project(database, "tenant"))
        with TestClient(create_app(listing), headers=bearer(key)) as client:
            said = set()
            for name, folder in leads_out(roots).items():
                answer = self.ask(client, "/v1/jobs", folder)
                assert (answer.status_code, answer.json()["code"]) == (422, "local_models_disabled"), name
                found = self.ask(client, "/v1/jobs:validate", folder)
                said.add(found.text)
            assert len(said) == 1, "the same answer, whether or not there is such a folder, and what is in it"
            assert found.json()["problems"] == [
                {"code": "local_models_disabled", "detail": OUTSIDE, "errors": []}
            ]
            assert self.ask(client, "/v1/jobs", f"{roots}/listed/model").status_code == 201
            seen = self.ask(client, "/v1/jobs:validate", f"{roots}/listed/model").json()
            assert [problem["code"] for problem in seen["problems"]] == ["model_unsafe_format"]  # it was read

    def test_without_a_list_a_key_reaches_none(
        self, settings: Settings, database: SyncDatabase, roots: Path
    ) -> None:
        key = new_key(database, DEFAULT_PROJECT_ID)  # the owner's own project
        with TestClient(create_app(settings), headers=bearer(key)) as client:
            answer = self.ask(client, "/v1/jobs", f"{roots}/listed/model")
            assert (answer.status_code, answer.json()["detail"]) == (422, OUTSIDE)

    def test_weights_are_not_for_a_key_neither_at_once_nor_by_a_profile(
        self, listing: Settings, database: SyncDatabase, roots: Path
    ) -> None:
        model = f"{roots}/listed/model"
        key = new_key(database, DEFAULT_PROJECT_ID)
        with TestClient(create_app(listing)) as client:
            client.headers.update(bearer(key))
            refused = self.ask(client, "/v1/jobs", model, form="full")
            assert (refused.status_code, refused.json()["detail"]) == (422, WEIGHTS)
            found = self.ask(client, "/v1/jobs:validate", model, form="full").json()
            assert WEIGHTS in [problem["detail"] for problem in found["problems"]]
            job_id = self.ask(client, "/v1/jobs", model).json()["id"]
            finish(database, advance(database, job_id, StepName.EVALUATE))
            profile = client.get(f"/v1/jobs/{job_id}").json()["result"]["profile_id"]
            path = f"/v1/profiles/{profile}/checkpoints"
            body = {"budget": {"metric": "kept", "value": 0.5}, "form": "full"}
            again = client.post(path, json=body)
            assert (again.status_code, again.json()["detail"]) == (422, WEIGHTS)
            assert client.post(path, json={**body, "form": "adapter"}).status_code == 202
            assert client.post(path, json=body, headers=OWNER).status_code == 202

    def test_a_profile_of_the_owners_model_opens_it_to_no_key(
        self, settings: Settings, database: SyncDatabase, roots: Path
    ) -> None:
        job = queue_job(database, model={"id": f"{roots}/private/model"})
        finish(database, advance(database, job.id, StepName.EVALUATE))
        key = new_key(database, DEFAULT_PROJECT_ID)
        with TestClient(create_app(settings), headers=bearer(key)) as client:
            result = client.get(f"/v1/jobs/{job.id}").json()["result"]
            body = {"budget": {"metric": "kept", "value": 0.5}}
            path = f"/v1/profiles/{result['profile_id']}/checkpoints"
            assert client.post(path, json=body).json()["detail"] == OUTSIDE
            assert client.post(path, json=body, headers=OWNER).status_code == 202


class TestTheWorker:
    def tenants_job(self, database: SyncDatabase, listing: Settings, model: str) -> str:
        principal = principal_of(DEFAULT_PROJECT_ID)
        body = JobCreate.model_validate(job_body(model={"id": model}))
        return database.write(service.create, body=body, principal=principal, settings=listing).id

    def test_a_link_that_was_laid_after_the_job_was_taken_fails_it(
        self, settings: Settings, database: SyncDatabase, script: Script, roots: Path
    ) -> None:
        listing = settings.model_copy(update={"model_roots": (roots / "listed",)})
        late = roots / "listed" / "late"
        job_id = self.tenants_job(database, listing, str(late))
        late.symlink_to(roots / "private" / "model")
        with running(listing):
            until(lambda: read_job(database, job_id).ended, "the job ends")
        error = read_job(database, job_id).error
        assert error is not None
        assert (error.code, error.message, error.retryable) == ("model_not_found", OUTSIDE, False)
        assert script.runs() == [], "no step has seen the folder"

    def test_a_worker_has_a_list_of_its_own(
        self, settings: Settings, database: SyncDatabase, storage: Storage, roots: Path, tmp_path: Path
    ) -> None:
        listing = settings.model_copy(update={"model_roots": (roots / "listed",)})
        self.tenants_job(database, listing, f"{roots}/listed/model")
        lease = must_claim(database)
        order = database.read(load_order, lease, settings)
        with pytest.raises(FolderRefused):
            prepare(order, lease, storage, settings, tmp_path / "step")
        assert not (tmp_path / "step").exists()
        assert prepare(order, lease, storage, listing, tmp_path / "a" / "b" / "c").model.id == order.model.id

    def test_the_owners_job_goes_where_the_server_can_read(
        self, settings: Settings, database: SyncDatabase, storage: Storage, roots: Path, tmp_path: Path
    ) -> None:
        job = queue_job(database, principal=local_principal(), model={"id": f"{roots}/private/model"})
        lease = must_claim(database)
        assert lease.job_id == job.id
        order = database.read(load_order, lease, settings)
        request = prepare(order, lease, storage, settings, tmp_path / "a" / "b" / "c")
        assert request.model.id == f"{roots}/private/model"
