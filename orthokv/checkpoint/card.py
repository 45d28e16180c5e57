"""The model card of a checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from orthokv.show.wording import KEY_MODES_IN_WORDS, begin_at, markdown, number, percent
from orthokv.spec.hub_ids import is_hub_id

_FILE_SUFFIX = re.compile(r"\.(jsonl?|ndjson|txt|md|parquet|gz|zst|csv)$", re.IGNORECASE)

_SHARING = {
    "head": "a basis for every KV head",
    "tied": "one key basis used by all KV heads of a layer, a value basis for every KV head",
    "pair": "one basis over every 2 neighbouring KV heads",
    "quad": "one basis over every 4 neighbouring KV heads",
    "joint": "one basis over the concatenated KV heads of a layer",
    "auto": "each layer has the narrowest groups of heads that are nearly as good as the best at equal bytes",
}
_FILES = {
    "orthokv.json": "ranks, geometry, origin and measurements",
    "orthokv.safetensors": "bases at the chosen ranks",
    "profile.json": "error of every layer by rank",
    "profile.safetensors": "bases at full rank, from which other budgets are served without a new fit",
    "SHA256SUMS": "digests that loading verifies",
}


def model_card(config: Mapping[str, Any], *, repo_id: str | None = None) -> str:
    """The README of a checkpoint from its `orthokv.json`: Markdown with the hub's YAML front matter.

    `repo_id` is the hub repository that the card is for, None for a folder.

    Every figure comes from `config`; what was not measured is said to be so. Folders of the machine that made the
    checkpoint are not published: a local base model or data set appears by its last name only.
    """
    name = _display_name(config["base_model"]["id"], hub=_hub_id(config) is not None)
    cache = config["cache"]
    sections = [
        _front_matter(config, published=repo_id is not None),
        f"# KV cache of {_code(name)} at {percent(cache['kept'])}",
        f"Low-rank bases that keep the KV cache of {_code(name)} in {percent(cache['kept'])} of its 16-bit bytes; "
        "made with OrthoKV. The model's weights are unchanged.",
        "## Quality",
        *_quality(config),
        "## Cache",
        f"Counted on a live cache with 16-bit latents: **{_bytes(cache['bytes_per_token'])} bytes per token**, "
        f"uncompressed {_bytes(cache['bytes_per_token_dense'])}; {percent(cache['kept'])} kept.",
        "## Load",
        *_load(config, repo_id or "path/to/this/folder"),
        "## Ranks",
        *_rank_table(config),
        "## How it was made",
        _origin(config),
        "## Limits",
        _limits(config),
        "## Licence",
        _licence(config, name),
        "## Files",
        _files(config),
    ]
    return "\n\n".join(sections) + "\n"


def _hub_id(config: Mapping[str, Any]) -> str | None:
    """The base model's hub id, or None for a folder. Only a hub model has a revision: a relative folder can look alike."""
    base = config["base_model"]
    if base.get("revision") is None or not is_hub_id(str(base["id"])):
        return None
    return str(base["id"])


def _display_name(source: str, *, hub: bool) -> str:
    """A hub id as it is; of a path the last part."""
    return source if hub else re.split(r"[\\/]", source.rstrip("\\/"))[-1] or "local"


def _data_name(source: str) -> str:
    return _display_name(source, hub=is_hub_id(source) and not _FILE_SUFFIX.search(source))


def _code(text: object) -> str:
    """Text from outside as inert inline code: no markup, no line break, no cell border."""
    return "`" + re.sub(r"[`|\s]+", " ", str(text)).strip() + "`"


def _bytes(count: float) -> str:
    return f"{count:.1f}".removesuffix(".0")


def _front_matter(config: Mapping[str, Any], *, published: bool) -> str:
    lines = ["---", "library_name: transformers"]
    if (base := _hub_id(config)) is not None:
        lines.append(f"base_model: {base if '/' in base else json.dumps(base)}")
        if published:
            # Without it the hub guesses a finetune: the weights are unchanged.
            lines.append(f"base_model_relation: {'quantized' if config['form'] == 'full' else 'adapter'}")
    return "\n".join([*lines, "tags: [kv-cache, orthokv, low-rank]", "---"])


def _quality(config: Mapping[str, Any]) -> list[str]:
    measured = config.get("measured")
    if not measured:
        return ["Quality was not measured for this plan."]
    rows: list[tuple[str, str, str]] = []

    def pair(label: str, key: str, written: Callable[[float], str] = number) -> None:
        if key in measured:
            dense = measured.get(f"{key}_dense")
            rows.append((label, written(measured[key]), "" if dense is None else written(dense)))

    pair("perplexity", "perplexity")
    if "perplexity" in measured and measured.get("perplexity_dense"):
        ratio = measured["perplexity"] / measured["perplexity_dense"]
        rows.append(("perplexity over uncompressed", number(ratio), ""))
    pair("KL divergence of predictions, nats per token", "kl")
    for label, key, worst in (
        ("largest relative error of a layer's output", "layer_error", max),
        ("smallest cosine of a layer's output", "layer_cosine", min),
    ):
        if values := measured.get(key):
            found = worst(values)
            rows.append((f"{label} (layer {values.index(found)})", number(found), ""))
    pair("cache bytes per token", "cache_bytes_per_token", _bytes)
    pair("cache kept", "kept", percent)
    pair("decoding, tokens per second", "tokens_per_second")
    return [markdown(("", "compressed", "uncompressed"), rows), *_measured_on(config, measured)]


def _measured_on(config: Mapping[str, Any], measured: Mapping[str, Any]) -> list[str]:
    parts: list[str] = []
    if "tokens" in measured:
        parts.append(f"{measured['tokens']} predicted tokens")
    if source := measured.get("dataset"):
        if isinstance(source, dict) and (where := begin_at(source.get("starts", ()))):
            parts.append(where)
        source = source["source"] if isinstance(source, dict) else str(source)
        same = ", the source of the calibration text" if source == config["dataset"].get("source") else ""
        parts.append(f"text of {_code(_data_name(source))}{same}")
    parts += [_code(measured[key]) for key in ("dtype", "device") if key in measured]
    return [f"Measured on {'; '.join(parts)}."] if parts else []


def _load(config: Mapping[str, Any], place: str) -> list[str]:
    here = json.dumps(place)
    if config["form"] == "full":
        code = [
            "import orthokv",
            "from transformers import AutoModelForCausalLM",
            "",
            f"model = AutoModelForCausalLM.from_pretrained({here})",
        ]
        return [
            "The base model's files are included; importing `orthokv` is what teaches `transformers` the format.",
            "\n".join(["```python", *code, "```"]),
        ]
    base = _hub_id(config)
    where = json.dumps(base) if base else '"path/to/the/base/model"'
    revision = f", revision={json.dumps(str(config['base_model']['revision']))}" if base else ""
    code = [
        "import orthokv",
        "from transformers import AutoModelForCausalLM",
        "",
        f"model = AutoModelForCausalLM.from_pretrained({where}{revision})",
        f"orthokv.attach(model, {here})",
    ]
    return ["\n".join(["```python", *code, "```"]), "`orthokv.detach(model)` takes it off again."]


def _rank_table(config: Mapping[str, Any]) -> list[str]:
    geometry, ranks = config["geometry"], config["ranks"]
    heads, head_dim = geometry["kv_heads"], geometry["head_dim"]
    width = heads * head_dim
    expected = (config.get("plan") or {}).get("expected_error") or []
    measured = (config.get("measured") or {}).get("layer_error") or []
    # Where layers differ, each names its own.
    chosen = config["sharing"] == "auto"
    head = ["layer", *(["sharing"] if chosen else [])]
    for side in ("keys", "values"):
        head += [f"{side}: per head", "layer total", "of width"]
    columns = [("error, expected", expected), ("error, measured", measured)]
    columns = [(label, values) for label, values in columns if len(values) == len(ranks)]
    rows: list[list[str]] = []
    for i, entry in enumerate(ranks):
        row = [str(i), *([entry["sharing"]] if chosen else [])]
        for side in ("key", "value"):
            total = entry[side]["total"]
            row += [f"{entry[side]['per_head']:g}", str(total), percent(total / width)]
        rows.append(row + [number(values[i], 3) for _, values in columns])
    return [
        f"Numbers cached per token. Uncompressed, a layer caches {width} for its keys and {width} for its values "
        f"({heads} KV heads x {head_dim}).",
        markdown([*head, *(label for label, _ in columns)], rows, left=0),
    ]


def _origin(config: Mapping[str, Any]) -> str:
    base, data, plan = config["base_model"], config["dataset"], config.get("plan") or {}
    name = _display_name(base["id"], hub=_hub_id(config) is not None)
    rows = [
        ("base model", _code(name) + (f", revision {_code(base['revision'])}" if _hub_id(config) else ""))
    ]
    if base.get("digest"):
        rows.append(("base model sha256", _code(base["digest"])))
    settings = ", ".join(f"{key} {value}" for key, value in config["method"].items() if key != "name")
    rows.append(("method", _code(config["method"]["name"]) + (f" ({_code(settings)})" if settings else "")))
    rows.append(("sharing", f"`{config['sharing']}`: {_SHARING[config['sharing']]}"))
    rotary = config["geometry"].get("rope") is not None
    meaning = (
        KEY_MODES_IN_WORDS[config["key_mode"]].replace("keys", "keys cached")
        if rotary
        else "the model has no RoPE"
    )
    rows.append(("key mode", f"`{config['key_mode']}`: {meaning}"))
    rows.append(("codec", _code(config["codec"]["name"])))
    if plan:
        budget = f"{plan['budget']['metric']} <= {plan['budget']['value']:g}"
        rows.append(("ranks", f"allocation {_code(plan['allocation'])} for {_code(budget)}"))
    if plan.get("expected_kl") is not None:
        expected = f"{number(plan['expected_kl'], 3)} nats per token (from the profile, not measured)"
        rows.append(("expected KL divergence", expected))
    text = _code(_data_name(data.get("source", "unknown")))
    if "num_samples" in data:
        text += f", {data['num_samples']} samples x {data['sequence_length']} tokens"
    if data.get("held_out"):
        text += f", {data['held_out']} of them held out of the fit"
    rows.append(("calibration text", text))
    if data.get("digest"):
        rows.append(("token ids sha256", _code(data["digest"])))
    rows.append(("calibrated positions", f"0 to {config['calibrated_positions'] - 1}"))
    rows.append(("seed", str(config["seed"])))
    rows.append(("producer", f"{config['producer']['name']} {config['producer']['version']}"))
    return markdown(("", ""), rows, left=2)


def _limits(config: Mapping[str, Any]) -> str:
    positions, rotary = config["calibrated_positions"], config["geometry"].get("rope") is not None
    lines = [
        f"The bases were fitted on positions 0 to {positions - 1}. Quality beyond them is not measured.",
        "Quality on other kinds of text than the calibration's can be worse: evaluate on your own.",
    ]
    if config["key_mode"] == "post" and rotary:
        length = config["dataset"]["sequence_length"]
        spread = (
            "" if length == positions else f"; blocks of {length} tokens were spread over the positions above"
        )
        lines.append(
            "Key mode `post`: keys are compressed after rotation, so the bases depend on absolute positions and may "
            f"serve later ones badly{spread}."
        )
    elif config["key_mode"] == "pre":
        rotated = " and rotated" if rotary else ""
        lines.append(
            f"Key mode `pre`: all cached keys are rebuilt{rotated} at every decoding step. It saves memory first; "
            "decoding is not expected to be faster."
        )
    return "\n".join(f"- {line}" for line in lines)


def _licence(config: Mapping[str, Any], name: str) -> str:
    included = " and to its files, which are included" if config["form"] == "full" else ""
    return (
        f"The bases were computed from the weights of {_code(name)}: its licence and terms of use apply to them{included}. "
        "Those of the calibration text may, too."
    )


def without_paths(described: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration or profile whose base model and texts, where they are local files, have their last name only."""
    shown = dict(described)
    for key in ("base_model", "model"):
        if key in shown:
            hub = _hub_id({"base_model": shown[key]}) is not None
            shown[key] = {**shown[key], "id": _display_name(str(shown[key]["id"]), hub=hub)}
    if "source" in (shown.get("dataset") or {}):
        shown["dataset"] = {**shown["dataset"], "source": _data_name(str(shown["dataset"]["source"]))}
    if isinstance(shown.get("measured"), dict):
        shown["measured"] = without_paths(shown["measured"])
    return shown


def _files(config: Mapping[str, Any]) -> str:
    full = "the base model's own files, with `quantization_config` added to `config.json`; "
    listed = "; ".join(f"`{name}`: {what}" for name, what in _FILES.items())
    return f"Format version {config['format_version']}. {full if config['form'] == 'full' else ''}{listed}."
