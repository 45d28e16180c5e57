"""Is a fit repeatable? Twice on one device to the bit; on two devices to the same plan and nearly the same perplexity.

python -m benchmarks.parity --device cuda --out cuda.json                 # where there is a GPU
python -m benchmarks.parity --device cpu --against cuda.json --out both.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

from benchmarks.bench import CALIBRATION, MODEL, TEXTS, Bench, need_shared, shares
from orthokv.compare import MethodChoice
from orthokv.measure.checkpoint import device_name
from orthokv.measure.quality import quality
from orthokv.planning.allocate import allocate
from orthokv.planning.bases import planned_bases
from orthokv.planning.profile import ErrorProfile
from orthokv.runtime.seam import Seam
from orthokv.spec.budget import Budget
from orthokv.spec.settings import FitSettings
from orthokv.text.blocks import Blocks


def digest(profile: ErrorProfile) -> str:
    """SHA-256 over every tensor of a profile and every number beside them."""
    found = hashlib.sha256(json.dumps(profile.to_dict(), sort_keys=True).encode())
    for layer in profile.layers:
        for name, tensor in sorted(layer.tensors().items()):
            found.update(name.encode())
            found.update(tensor.numpy().tobytes())
    return found.hexdigest()


def run(
    bench: Bench, settings: FitSettings, choice: MethodChoice, texts: list[Blocks], kept: list[float]
) -> Any:
    calibration, evaluation = texts
    fits = [bench.profile(calibration, choice, settings, None)[0] for _ in range(2)]
    plans = []
    for share in kept:
        plan = allocate(fits[0], Budget("kept", share))
        with Seam(bench.model, fits[0].key_mode) as seam:
            found = quality(seam, planned_bases(bench.model, fits[0], plan), evaluation)
        plans.append({"kept": share, "ranks": plan.ranks, "perplexity": found.perplexity})
    return {
        "device": device_name(bench.model.device),
        "digests": [digest(fit) for fit in fits],
        "bit_identical": digest(fits[0]) == digest(fits[1]),
        "plans": plans,
    }


def compare(one: Any, other: Any) -> dict[str, Any]:
    """Whether two runs gave the same bits; per budget the largest difference of a rank and the ratio of perplexities."""
    plans = [
        {
            "kept": a["kept"],
            "same_ranks": [list(pair) for pair in a["ranks"]] == [list(pair) for pair in b["ranks"]],
            "largest_rank_difference": max(
                abs(x - y)
                for p, q in zip(a["ranks"], b["ranks"], strict=True)
                for x, y in zip(p, q, strict=True)
            ),
            "perplexity_ratio": a["perplexity"] / b["perplexity"],
        }
        for a, b in zip(one["plans"], other["plans"], strict=True)
    ]
    return {"bit_identical": one["digests"] == other["digests"], "plans": plans}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default=str(MODEL))
    parser.add_argument("--method", default="oblique:joint")
    parser.add_argument("--kept", default="0.5,0.25")
    parser.add_argument("--num-samples", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", help="of the model, e.g. float32; by default its own, float32 on a CPU")
    parser.add_argument("--against", type=Path, help="what another device wrote, to be compared with")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    need_shared(given.model, CALIBRATION[0], TEXTS["books-eval"])
    bench = Bench.load(given.model, given.device, given.dtype)
    choice = MethodChoice.parse(given.method)
    settings = choice.settings(
        FitSettings("stiefel", num_samples=given.num_samples, sequence_length=given.sequence_length)
    )
    texts = [
        bench.calibration([CALIBRATION[0]], settings),
        bench.evaluation(TEXTS["books-eval"], 8, given.sequence_length),
    ]
    found = {
        "model": bench.name,
        "method": given.method,
        "num_samples": given.num_samples,
        "sequence_length": given.sequence_length,
        "runs": [run(bench, settings, choice, texts, shares(given.kept))],
    }
    print(json.dumps(found["runs"][0], indent=1))
    if given.against is not None:
        other = json.loads(given.against.read_text())["runs"][0]
        found["runs"].append(other)
        found["comparison"] = compare(found["runs"][0], other)
        print(json.dumps(found["comparison"], indent=1))
    given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
