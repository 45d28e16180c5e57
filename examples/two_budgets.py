"""Two more budgets from the profile of one checkpoint, without another fit; `compress.py` makes the checkpoint."""

import argparse

import orthokv

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--profile", default="out/examples/small", help="any checkpoint, or a downloaded profile")
parser.add_argument("--dataset", default="README.md", help="text that the model did not write")
parser.add_argument("--out", default="out/examples/kept")
given = parser.parse_args()

profile = orthokv.load_profile(given.profile)
for kept in (0.75, 0.25):
    out = f"{given.out}-{kept}"
    plan = orthokv.plan(profile, kept=kept, out=out)
    found = orthokv.evaluate(out, given.dataset, num_samples=4, sequence_length=128, speed=False)
    ratio = found["perplexity"] / found["perplexity_dense"]
    print(f"{out}: {plan.bytes_per_token} bytes a token, perplexity {ratio:.3f} x, KL {found['kl']:.3f} nats")
