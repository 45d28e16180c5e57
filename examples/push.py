"""Bring a checkpoint to the hub, with its card; without `--send` nothing leaves this machine.

Sending needs a token that may write: `HF_TOKEN`, or `hf auth login`. `compress.py` makes the checkpoint.
"""

import argparse
from pathlib import Path

from orthokv.checkpoint.hub import prepare, upload

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--checkpoint", type=Path, default=Path("out/examples/small"))
parser.add_argument("--repository", default="your-name/demo-llama-3m-kv50")
parser.add_argument("--send", action="store_true")
given = parser.parse_args()

prepared = prepare(given.checkpoint, given.repository)  # verifies every file, and takes local paths out
for name, size in prepared.sizes.items():
    print(f"{size:>12}  {name}")
if given.send:
    print(f"pushed: {upload(prepared, private=True).url}")
else:
    print(f"nothing was sent to {given.repository}; --send does it")
