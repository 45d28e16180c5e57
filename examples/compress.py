"""Compress a model: half of the cache's bytes, with bases fitted to text that the model writes itself.

python examples/compress.py --model org/model --dataset calibration.jsonl --kept 0.25
"""

import argparse

import orthokv

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="demo/demo-llama-3m")
parser.add_argument("--dataset", default="self", help="a file, a hub id, or self")
parser.add_argument("--kept", type=float, default=0.5)
parser.add_argument("--out", default="out/examples/small")
given = parser.parse_args()

# So few blocks and steps only show how it goes. Without these settings there are 64 blocks and 200 + 400 steps.
quick = {"num_samples": 8, "sequence_length": 128, "steps": 10, "refine_steps": 10}
made = orthokv.compress(given.model, given.dataset, kept=given.kept, out=given.out, **quick)

print(f"{made.plan.bytes_per_token} of {made.plan.dense_bytes_per_token} bytes a token, in {given.out}")
print(f"ranks of keys and values, by layer: {made.plan.ranks}")
print(f"perplexity {made.measured['perplexity']:.2f}, uncompressed {made.measured['perplexity_dense']:.2f}")
