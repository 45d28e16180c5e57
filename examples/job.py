"""The same as `compress.py` by a service: start `orthokv serve`, then run this.

It needs the client alone, `pip install ./clients/python`, and no torch.
"""

import argparse
from pathlib import Path

from orthokv_client import OrthoKV

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=str(Path("demo/demo-llama-3m").resolve()))
parser.add_argument("--dataset", type=Path, default=Path("README.md"))
parser.add_argument("--out", type=Path, default=Path("out/examples/job"))
given = parser.parse_args()

with OrthoKV() as client:  # the service of ORTHOKV_URL, or http://127.0.0.1:8000
    dataset = client.datasets.upload(given.dataset)
    job = client.jobs.create(
        {
            "model": {"id": given.model},
            "dataset": {"id": dataset.id, "num_samples": 8, "sequence_length": 128},
            "budget": {"metric": "kept", "value": 0.5},
            "method": {"steps": 10, "refine_steps": 10},
        }
    )
    job = client.jobs.wait(job.id)
    if job.result is None or job.result.checkpoint_id is None:
        raise SystemExit(f"{job.status}: {job.error}")
    for path in client.checkpoints.download(job.result.checkpoint_id, given.out):
        print(path)
