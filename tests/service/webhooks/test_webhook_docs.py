"""The receiver of docs/webhooks.md, as it stands there, against a real server."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from tests.support.factories import job_body
from tests.support.orthokv_server import Server, until
from tests.support.paths import REPOSITORY
from tests.support.provision import free_port

pytestmark = pytest.mark.slow  # real processes, one after the other


def test_the_receiver_of_the_documentation_verifies_and_takes_each_message_once(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "webhooks.md").read_text(), re.DOTALL)
    (tmp_path / "receiver.py").write_text(code)
    port = free_port()
    url = f"http://127.0.0.1:{port}/"
    environment = {"ORTHOKV_OUTBOUND_PRIVATE_HOSTS": '["127.0.0.1"]', "ORTHOKV_WEBHOOK_POLL_SECONDS": "0.05"}
    with Server(tmp_path / "data", environment) as server:
        hook = server.post("/v1/webhook_endpoints", {"url": url, "event_types": ["job.created"]})
        receiver = subprocess.Popen(
            [sys.executable, "receiver.py"],
            cwd=tmp_path,
            env={**os.environ, "WEBHOOK_SECRET": hook["secret"], "PORT": str(port)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            until(lambda: _answers(url), "the receiver is up")
            jobs = [server.post("/v1/jobs", job_body(model={"id": "nobody/nothing"}))["id"] for _ in range(2)]
            path = f"/v1/webhook_endpoints/{hook['id']}/deliveries"
            until(lambda: not server.get(path, status="pending")["data"], "both are delivered")
            for delivery in server.get(path)["data"]:
                server.post(f"{path}/{delivery['id']}/redeliver", {})
            until(lambda: not server.get(path, status="pending")["data"], "both are delivered again")
            assert {one["status"] for one in server.get(path)["data"]} == {"succeeded"}
            assert {one["attempts"] for one in server.get(path)["data"]} == {2}
            forged = httpx2.post(url, content=b"{}", headers={"webhook-id": "msg_0"}, timeout=10)
            assert forged.status_code == 401
        finally:
            receiver.terminate()
            printed, _ = receiver.communicate(timeout=30)
    assert sorted(printed.splitlines()) == sorted(f"job.created {job_id} queued" for job_id in jobs)


def _answers(url: str) -> bool:
    try:
        return httpx2.post(url, content=b"", timeout=5).status_code == 401
    except httpx2.HTTPError:
        return False
