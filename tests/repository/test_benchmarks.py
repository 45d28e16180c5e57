"""A benchmark that broke off goes on where it stopped, and the page of results holds nothing that no file says."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import ablation, answers, quality, report
from benchmarks.bench import Bench, Results, named_files, need_shared
from orthokv.compare import MethodChoice
from orthokv.show.results import ComparisonRow
from orthokv.spec.settings import FitSettings
from tests.library.test_results import ROW
from tests.support.tiny import tiny_folder, tiny_profile, tiny_text


def run(monkeypatch: pytest.MonkeyPatch, main: Any, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, arguments)])
    main()


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    found = [tmp_path / f"{name}.txt" for name in ("one", "two", "eval")]
    for seed, path in enumerate(found):
        path.write_text(tiny_text(600, seed))
    return found


# ------------------------------------------------------------------------------------------- result files


def test_a_result_file_is_continued_under_the_same_header_only(tmp_path: Path) -> None:
    path = tmp_path / "new" / "q.json"
    Results.open(path, {"model": "m", "steps": 2}).add(ROW, variant="a")
    again = Results.open(path, {"model": "m", "steps": 2})
    assert again.has(variant="a", method="eigen", kept_asked=0.5)
    assert not again.has(variant="b", method="eigen", kept_asked=0.5)
    with pytest.raises(SystemExit, match="another steps"):
        Results.open(path, {"model": "m", "steps": 3})


def test_what_is_refused_once_is_refused_for_all_that_it_does_not_name(tmp_path: Path) -> None:
    results = Results.open(tmp_path / "q.json", {})
    results.refuse("cannot be", method="palu", key_mode="post")
    assert results.has(method="palu", key_mode="post", seed=1, text="books")
    assert not results.has(method="palu", key_mode="pre", seed=1, text="books")


def quality_arguments(folder: Path, texts: list[Path], out: Path) -> list[object]:
    return [
        folder, "--calibration", f"{texts[0]},{texts[1]}", "--eval", f"t={texts[2]}", "--methods",
        "eigen:tied,palu:joint,stiefel:joint", "--kept", "0.5,0.25", "--seeds", "0,1", "--steps", 2, "--num-samples", 8,
        "--sequence-length", 16, "--eval-samples", 2, "--profile-samples", 1, "--device", "cpu", "--out", out,
    ]  # fmt: skip


def test_a_broken_run_ends_with_the_figures_of_an_unbroken_one(
    tmp_path: Path, texts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = tiny_folder(tmp_path, "llama"), tmp_path / "q.json"
    run(monkeypatch, quality.main, *quality_arguments(folder, texts, out))
    whole = json.loads(out.read_text())
    made = {(r["method"], r["key_mode"], r["allocation"], r["kept_asked"], r["seed"]) for r in whole["rows"]}
    assert len(made) == len(whole["rows"])
    assert {("stiefel", mode, "knapsack", 0.25, seed) for mode in ("pre", "post") for seed in (0, 1)} <= made
    assert ("stiefel", "pre", "greedy", 0.5, 0) in made
    assert {(r["method"], r["key_mode"]) for r in whole["refused"]} == {
        ("palu", "post"), ("eigen", "pre"),
    }  # fmt: skip
    assert out.with_suffix(".png").stat().st_size > 10_000

    out.write_text(json.dumps({**whole, "rows": whole["rows"][:5], "refused": []}))
    run(monkeypatch, quality.main, *quality_arguments(folder, texts, out))
    again = json.loads(out.read_text())
    assert [{**row, "seconds": 0} for row in again["rows"]] == [
        {**row, "seconds": 0} for row in whole["rows"]
    ]
    assert again["refused"] == whole["refused"]

    run(monkeypatch, quality.main, *quality_arguments(folder, texts, out))
    assert json.loads(out.read_text()) == again  # the seconds too: nothing was fitted again


@pytest.mark.slow
def test_several_processes_find_what_one_finds(
    tmp_path: Path, texts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, one, several = tiny_folder(tmp_path, "llama"), tmp_path / "one.json", tmp_path / "several.json"
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))  # sums depend on it

    def measure(out: Path, *more: object) -> dict[str, Any]:
        methods = ["--methods", "eigen:head,stiefel:joint", "--key-modes", "pre", *more]
        run(monkeypatch, quality.main, *quality_arguments(folder, texts, out), *methods)
        found: dict[str, Any] = json.loads(out.read_text())
        return {**found, "rows": [{**row, "seconds": 0} for row in found["rows"]]}

    assert measure(several, "--processes", 2) == measure(one)
    assert not several.with_suffix(".parts").exists()


@pytest.mark.slow
def test_a_fit_that_fails_in_its_process_ends_the_run_and_loses_no_other(
    tmp_path: Path, texts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = tiny_folder(tmp_path, "llama"), tmp_path / "q.json"
    parts = out.with_suffix(".parts")
    (parts / "eigen-tied-pre-0.json").mkdir(parents=True)  # no file can be written in its place
    methods = ["--methods", "eigen:tied,eigen:head", "--key-modes", "pre", "--processes", 2]
    with pytest.raises(SystemExit, match="1 of 2 fits failed"):
        run(monkeypatch, quality.main, *quality_arguments(folder, texts, out), *methods)
    assert len(json.loads((parts / "eigen-head-pre-0.json").read_text())["rows"]) == 2


def test_kept_fits_are_used_again(tmp_path: Path, texts: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = tiny_folder(tmp_path, "llama"), tmp_path / "q.json"
    arguments = [
        *quality_arguments(folder, texts, out),
        "--key-modes",
        "pre",
        "--profiles",
        tmp_path / "fits",
    ]
    run(monkeypatch, quality.main, *arguments)
    whole = json.loads(out.read_text())
    out.unlink()
    run(monkeypatch, quality.main, *arguments)
    assert json.loads(out.read_text()) == whole


def test_without_the_bench_material_a_benchmark_says_so_and_fails_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("benchmarks.bench.SHARED", tmp_path)
    need_shared("/elsewhere", "self")
    with pytest.raises(SystemExit) as stopped:
        need_shared(str(tmp_path / "models" / "x"))
    assert stopped.value.code == 0
    assert "nothing measured" in capsys.readouterr().err


def test_texts_are_named_by_the_user_or_by_their_file() -> None:
    assert named_files(["a=/x/b.txt", "/y/c.jsonl"]) == {"a": "/x/b.txt", "c": "/y/c.jsonl"}


@pytest.mark.parametrize("text", [*quality.METHOD_LIST, *quality.RULES])
def test_every_method_of_the_benchmark_is_one(text: str) -> None:
    assert text in quality.METHOD_LIST
    MethodChoice.parse(text).settings(FitSettings())


# ------------------------------------------------------------------------------------------------ ablation


@pytest.mark.parametrize("question", ablation.ABLATIONS)
def test_every_answer_of_an_ablation_can_be_fitted_and_they_differ(question: str) -> None:
    answers = ablation.ABLATIONS[question].values()
    assert len(set(answers)) == len(answers) > 1
    for variant in answers:
        MethodChoice.parse(variant.method).settings(FitSettings(propagate=variant.propagate))
        assert variant.calibration in ablation.DOMAINS


@pytest.mark.parametrize(("side", "kept"), [("both", 0.25), ("key", 0.625), ("value", 0.625)])
def test_one_side_is_cut_and_the_other_whole(tmp_path: Path, side: ablation.Side, kept: float) -> None:
    profile = tiny_profile(tiny_folder(tmp_path, "llama"), key_mode="post")
    plan = ablation.plan_of(profile, 0.25, side)
    assert plan.kept == pytest.approx(kept)
    assert {key for key, _ in plan.ranks} == {32 if side == "value" else 8}
    assert {value for _, value in plan.ranks} == {32 if side == "key" else 8}


def test_variants_of_one_fit_are_fitted_once(
    tmp_path: Path, texts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out, fits = tiny_folder(tmp_path, "llama"), tmp_path / "a.json", []
    small = {
        name: ablation.Variant(num_samples=8, sequence_length=16, side=name)
        for name in ("both", "key", "value")
    }
    for module in (ablation, report):
        monkeypatch.setattr(module, "ABLATIONS", {"side": small})
    monkeypatch.setattr(ablation, "DOMAINS", {"books": (str(texts[0]),)})
    monkeypatch.setattr(ablation, "need_shared", lambda *paths: None)
    fit = Bench.profile
    monkeypatch.setattr(Bench, "profile", lambda *given: fits.append(given) or fit(*given))
    monkeypatch.setattr(Bench, "evaluation", lambda self, path, samples, _: whole(self, path, samples, 16))
    arguments = [
        "--eval",
        f"t={texts[2]}",
        "--steps",
        1,
        "--seeds",
        0,
        "--eval-samples",
        2,
        "--device",
        "cpu",
        "--out",
        out,
    ]
    run(monkeypatch, ablation.main, folder, *arguments)
    assert len(fits) == 1
    rows = json.loads(out.read_text())["rows"]
    assert {(row["side"], row["kept_asked"]) for row in rows} == {(s, k) for s in small for k in (0.5, 0.25)}
    run(monkeypatch, ablation.main, folder, *arguments)
    assert len(fits) == 1
    table = report.ablation(json.loads(out.read_text()))["side"]
    assert [line.split("|")[1].strip() for line in table.splitlines()[4:]] == ["both", "key", "value"]


whole = Bench.evaluation


# ---------------------------------------------------------------------------------------------- the page


def test_the_pages_of_results_are_what_the_files_give() -> None:
    found, plots = report.sections()
    page, appendix = report.PAGE.read_text(), report.APPENDIX.read_text()
    assert report.fill(page, found) == page
    assert report.appendix(found) == appendix
    for name, section in found.items():
        assert section in page or section in appendix, f"{name} was measured and is not shown"
    for path in plots:
        assert path.is_file()
        assert path.name in page + appendix


def test_a_page_asks_for_no_section_that_nobody_measures() -> None:
    found, _ = report.sections()
    assert {match[1] for match in report._SECTION.findall(report.PAGE.read_text())} <= found.keys()


def test_an_answer_is_the_mean_over_seeds_of_the_rows_that_it_names() -> None:
    rows = [
        replace(ROW, method="oblique", sharing="joint", kept_asked=0.5, text="books", seed=seed, perplexity=p)
        for seed, p in enumerate((11.0, 13.0))
    ]
    other = replace(rows[0], allocation="uniform", perplexity=99.0)
    assert answers.ratio([*rows, other], answers.DEFAULT, 0.5, "books") == "1.200"


def test_a_section_that_was_not_measured_says_so() -> None:
    page = "<!-- begin a -->\nold\n<!-- end a -->\ntext\n<!-- begin b -->\n<!-- end b -->\n"
    filled = report.fill(page, {"a": "| x |\n"})
    assert "old" not in filled
    assert "| x |" in filled
    assert filled.count("Not measured yet.") == 1
    assert report.fill(filled, {"a": "| x |\n"}) == filled


def test_sections_of_a_quality_file_hold_its_rows_and_conditions() -> None:
    header = {
        "model": "m",
        "dtype": "float32",
        "calibration": {"source": "books", "num_samples": 4, "sequence_length": 16},
        "texts": {"books": {"blocks": 2}, "docs": {"blocks": 3}},
    }
    rows = [ROW.to_dict(), {**ROW.to_dict(), "text": "docs", "perplexity": 20.0}]
    refused = [{"method": "palu", "key_mode": "post", "seed": 0, "reason": "RoPE"}]
    found = report.quality({"header": header, "rows": rows, "refused": refused})
    assert "**1.200**" in found["ratios-books"]
    assert "**2.000**" in found["ratios-docs"]
    assert "`m` in float32; calibrated on 4 x 16 tokens of books" in found["ratios-books"]
    assert "Device: cpu." in found["ratios-books"]
    assert found["refused"] == "- `palu, post`: RoPE\n"
    assert ComparisonRow(**rows[0]) == ROW
