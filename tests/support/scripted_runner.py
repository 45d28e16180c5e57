"""A runner that follows a script: a real process that speaks the real protocol, without any numerics.

    python scripted_runner.py FOLDER

`FOLDER/script.json` holds `{"layers": N, "faults": [...]}`, and `"pace": SECONDS` for long runs: so long
a step or layer takes at most, and nothing is noted. A fault is `{"step", "run", "do", "layer"?}`: in the
`run`-th run of a step (from 0), at that layer or at once, do one of `FAULTS`. Each run notes itself in
`FOLDER/runs.jsonl`, so tests can see what was run, and how often.
"""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.infra import failpoints

FOLDER = Path(sys.argv[1])
REQUEST: dict[str, Any] = json.load(sys.stdin)
SCRIPT: dict[str, Any] = json.loads((FOLDER / "script.json").read_text())
STEP: str = REQUEST["step"]
WORKDIR = Path(REQUEST["workdir"])
LIMITS = ("CORE", "FSIZE", "NOFILE")


def say(**message: Any) -> None:
    print(json.dumps(message), flush=True)


def make(name: str, content: bytes, media_type: str = "application/octet-stream", **more: Any) -> None:
    path = WORKDIR / name
    path.write_bytes(content)
    say(type="file", name=name, path=str(path), media_type=media_type, **more)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_a_line() -> None:
    sys.stdout.write('{"type": "progress", "pha')
    sys.stdout.flush()
    die()


def hang() -> None:
    (FOLDER / f"hanging-{STEP}").touch()
    signal.pause()


def hang_until_released() -> None:
    (FOLDER / f"hanging-{STEP}").touch()
    while not (FOLDER / "go-on").exists():
        time.sleep(0.02)


def babble() -> None:
    print("Downloading model: 42 %", flush=True)


def unknown_field() -> None:
    say(type="progress", phase="fitting", done=1, total=2, unit="layer", percent=50)


def user_error() -> None:
    say(type="error", code="model_unsupported", message="Architecture Foo is not supported.", retryable=False)
    sys.exit(1)


def out_of_memory() -> None:
    say(type="error", code="out_of_memory", message="CUDA out of memory.", retryable=True, layer=0)
    sys.exit(1)


def poison() -> None:
    say(type="error", code="internal", message="NaN in layer 1.", retryable=True, layer=1)
    sys.exit(1)


def transient() -> None:
    say(type="error", code="storage_error", message="The hub did not answer.", retryable=True)
    sys.exit(1)


def chatter() -> None:
    print("Loading weights", file=sys.stderr, flush=True)


def unreachable() -> None:
    say(type="error", code="budget_unreachable", message="No plan keeps 0.01.", retryable=False, best=0.07)
    sys.exit(3)


def no_result() -> None:
    sys.exit(0)


def foreign_file() -> None:
    say(type="file", name="passwd", path="/etc/passwd", media_type="text/plain")


def linked_file() -> None:
    link = WORKDIR / "link"
    link.symlink_to("/etc/passwd")
    say(type="file", name="link", path=str(link), media_type="text/plain")


def slash_in_name() -> None:
    make("blob", b"x")
    say(type="file", name="../blob", path=str(WORKDIR / "blob"), media_type="text/plain")


def leave_grandchild() -> None:
    if os.fork() == 0:
        signal.pause()
    (FOLDER / "had-grandchild").touch()


def full_disk() -> None:
    """Every write beyond 4 kB fails, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    try:
        (WORKDIR / "large").write_bytes(b"x" * 100_000)
    except OSError as error:
        say(type="error", code="storage_error", message=str(error), retryable=True)
        sys.exit(1)


def eat_memory() -> None:
    """Grow until somebody ends it, touching every page."""
    held = []
    while True:
        held.append(bytearray(b"x" * (4 << 20)))
        time.sleep(0.01)


def eat_memory_in_a_grandchild() -> None:
    if os.fork() == 0:
        eat_memory()
    signal.pause()


def write_much() -> None:
    with (WORKDIR / "large").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * (1 << 20))
        except OSError as error:
            say(type="error", code="storage_error", message=str(error), retryable=False)
    sys.exit(1)


FAULTS: dict[str, Callable[[], None]] = {
    function.__name__: function
    for function in (
        die,
        die_in_a_line,
        hang,
        hang_until_released,
        babble,
        unknown_field,
        user_error,
        out_of_memory,
        poison,
        transient,
        chatter,
        unreachable,
        no_result,
        foreign_file,
        linked_file,
        slash_in_name,
        leave_grandchild,
        full_disk,
        eat_memory,
        eat_memory_in_a_grandchild,
        write_much,
    )
}


def note_run() -> int:
    """Record this run; returns how many runs of this step came before."""
    file = FOLDER / "runs.jsonl"
    if "pace" in SCRIPT:
        return 0
    earlier = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    run = {
        "step": STEP,
        "layers": REQUEST["layers"],
        "pid": os.getpid(),
        "environment": sorted(os.environ),
        "limits": {name: resource.getrlimit(getattr(resource, f"RLIMIT_{name}")) for name in LIMITS},
        "umask": os.umask(0o077),
        "no_new_privs": "NoNewPrivs:\t1" in Path("/proc/self/status").read_text(),
        "temporary": os.environ["TMPDIR"],
        "network": network(),
        "request": REQUEST,
    }
    with file.open("a") as opened:
        opened.write(json.dumps(run) + "\n")
    return sum(one["step"] == STEP for one in earlier)


def network() -> str:
    """What happens to who calls: without a network nothing is reached, not even that nobody listens."""
    with socket.socket() as calling:
        return errno.errorcode[calling.connect_ex(("127.0.0.1", 9))]


def perform(run: int, layer: int | None) -> None:
    for fault in SCRIPT["faults"]:
        if (fault["step"], fault["run"], fault.get("layer")) == (STEP, run, layer):
            FAULTS[fault["do"]]()


def take_time() -> None:
    time.sleep(random.uniform(0, SCRIPT.get("pace", 0.0)))


def content(name: str) -> bytes:
    """What a file holds depends on the job's request alone, as with the real runner."""
    kept = json.dumps([name, REQUEST["settings"]["seed"], REQUEST["target"]["budget"]], sort_keys=True)
    return (kept * 200).encode()


def run_step() -> dict[str, Any]:
    if STEP == "resolve":
        model = {"id": REQUEST["model"]["id"], "revision": "0123abcd", "digest": "f" * 64}
        return {"model": model, "geometry": {"layers": SCRIPT["layers"], "heads": 4}}
    if STEP == "calibrate":
        make("blocks.safetensors", content("blocks"))
        return {"dataset": {"digest": "d" * 64, "num_samples": 4, "sequence_length": 64, "tokens": 256}}
    if STEP == "profile":
        make("profile.json", b'{"layers": []}', "application/json")
        make("profile.safetensors", content("profile"))
        make("profile.png", b"\x89PNG" + content("plot"), "image/png")
        return {"summary": {"layers": SCRIPT["layers"]}}
    if STEP == "package":
        make("orthokv.json", b'{"measured": null}', "application/json")
        make("orthokv.safetensors", content("bases"))
        make("README.md", b"# not measured yet\n", "text/markdown; charset=utf-8")
        make("SHA256SUMS", b"first\n", "text/plain")
        return {"plan": {"kept": REQUEST["target"]["budget"]["value"], "ranks": [1] * SCRIPT["layers"]}}
    make("orthokv.json", b'{"measured": {}}', "application/json")
    make("README.md", b"# measured\n", "text/markdown; charset=utf-8")
    make("SHA256SUMS", b"second\n", "text/plain")
    return {"measured": {"perplexity": 11.5, "perplexity_dense": 11.0, "kl": 0.01, "kept": 0.2499}}


def main() -> None:
    failpoints.arm_from_environment()
    run = note_run()
    perform(run, None)
    data: dict[str, Any] = {}
    if STEP == "fit":
        for layer in REQUEST["layers"]:
            perform(run, layer)
            take_time()
            say(type="progress", phase="fitting", done=layer, total=SCRIPT["layers"], unit="layer")
            make(
                f"layer-{layer:03d}.safetensors",
                content(f"layer {layer}"),
                layer=layer,
                metrics={"error": 0.1},
            )
    else:
        say(type="progress", phase=f"{STEP}-halfway", done=1, total=2, unit="sample")
        take_time()
        data = run_step()
    say(
        type="usage",
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        peak_gpu_bytes=None,
    )
    failpoints.hit(f"child.{STEP}")
    say(type="result", data=data)


main()
