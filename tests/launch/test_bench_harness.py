"""The harness of the benchmarks: turns, quantiles, lines, what fails and what has no time."""

import importlib.util
from pathlib import Path

import torch

from gq_triton.bench import harness
from gq_triton.bench.harness import in_turns, seconds, spread
from gq_triton.bench.record import as_csv, as_markdown, from_csv
from gq_triton.bench.run import Line, Run
from gq_triton.bench.shapes import gpt, reduced, resnet50, tiny

CPU = torch.device("cpu")


def elements(shapes):
    return sum(torch.Size(shape).numel() for shape in shapes)


def test_quantiles_are_those_of_20_and_80_per_cent():
    assert spread([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == (3.5, 2.0, 5.0)
    assert spread([7.0]) == (7.0, 7.0, 7.0)


def test_steps_are_timed_in_turns_and_calls_share_a_time(monkeypatch):
    order = []
    taken = in_turns([lambda: order.append("a"), lambda: order.append("b")], turns=2, calls=2)
    assert order == list("aabbaabb")
    assert [len(times) for times in taken] == [2, 2]
    order.clear()
    monkeypatch.setattr(harness, "ENOUGH", -1.0)  # every step is slow
    in_turns([lambda: order.append("a")], turns=9, least=3)
    assert len(order) == 3
    ticks = iter([10.0, 16.0])
    assert seconds(lambda: None, calls=3, clock=lambda: next(ticks)) == 2.0


def test_ratios_are_those_of_a_turn_or_to_the_median():
    run = Run(CPU, 100.0, turns=3)
    base, ours, once = run.note(
        "part", "case", "ms", {"torch": [1.0, 3.0, 4.0], "ours": [2.0, 9.0, 4.0], "once": [6.0]}
    )
    assert (base.median, base.ratio) == (3.0, 1.0)
    assert (ours.median, ours.ratio) == (4.0, 2.0)  # of 2, 3 and 1
    assert (once.ratio, once.ratio_low) == (2.0, 2.0)
    (alone,) = run.note("part", "case", "ms", {"ours": [3.0]}, base=[1.0])
    assert alone.ratio == 3.0


def test_what_fails_or_has_no_time_is_named():
    said = []
    run = Run(CPU, 1000.0, turns=1, tell=said.append)
    with run.case("part", "first") as begins:
        assert begins
        run.compare("part", "first", {"a": lambda: None})
    with run.case("part", "second"):
        raise RuntimeError("no room\nfor details")
    assert run.failures == ["part, second: RuntimeError: no room"]
    late = Run(CPU, -1.0, turns=3)
    with late.case("part", "third") as begins:
        assert not begins
    assert [line.note for line in run.lines + late.lines] == [
        "", "failed: RuntimeError: no room", "left out: no time",
    ]  # fmt: skip
    assert said == ["part: first", "part: second"]


def test_tables_have_the_columns_that_are_filled():
    run = Run(CPU, 100.0, turns=1)
    run.note("part", "a | b", "ms", {"plain": [1.0, 2.0], "ours": [2.5, 5.0]})[1].more["GB/s"] = (
        12.34
    )
    head, _, plain, ours = as_markdown(run.lines).splitlines()
    assert head == "| case | step | median | 20 to 80 % | ratio | 20 to 80 % | GB/s |"
    assert plain == "| a / b | plain | 1.5 ms | 1.2 to 1.8 | 1 | 1 to 1 |  |"
    assert ours.endswith("| 2.5 | 2.5 to 2.5 | 12.3 |")
    facts = {"device": "a CPU: fast", "date": "today"}
    assert from_csv(as_csv(run.lines, facts)) == (run.lines, facts)


def test_shapes_are_those_of_the_models():
    assert (len(resnet50()), elements(resnet50())) == (161, 25_557_032)
    assert (len(gpt(768, 12, 1024)), elements(gpt(768, 12, 1024))) == (148, 124_439_808)
    assert 1.2e9 < elements(gpt(2048, 24, 2048)) < 1.4e9
    assert (len(tiny()), elements(tiny())) == (10_000, 640_000)
    layers, words = reduced(CPU)
    assert layers <= 1
    assert "of its 24 layers" in words


def load_page():
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "page.py"
    spec = importlib.util.spec_from_file_location("benchmark_page", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_newest_results(tmp_path, monkeypatch):
    module = load_page()
    run = Run(CPU, 100.0, turns=1)
    for case, times in (("K = 1", [3.0, 5.0]), ("K = 2", [6.0, 6.0])):
        run.note("clusters", case, "ms", {"plain": [2.0, 2.0], "clusters": times})
    run.lines[1].more["peak MiB"] = 7.0
    facts = {"device": "CPU", "threads": "2", "date": "2026-11-29"}
    for date, lines in (("2026-11-28", []), ("2026-11-29", run.lines)):
        (tmp_path / f"{date}_cpu_clusters.csv").write_text(as_csv(lines, facts))
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    text = "before\n<!-- bench: cpu clusters -->\nold\n<!-- end -->\nafter\n"
    made = module.page(text)
    assert made.splitlines()[2:] == [
        "",
        "*CPU, 2 threads, 2026-11-29; `gq-triton bench --only clusters`, "
        "2026-11-29_cpu_clusters.csv*",
        "",
        "|  | plain | clusters |",
        "| --- | --- | --- |",
        "| K = 1 | 2 ms | 2 (1.7 to 2.3) |",
        "| K = 2 | 2 ms | 3 (3 to 3) |",
        "",
        "Peak MiB:",
        "",
        "|  | clusters |",
        "| --- | --- |",
        "| K = 1 | 7 |",
        "",
        "<!-- end -->",
        "after",
    ]
    assert module.page(made) == made


def test_the_page_says_in_a_sentence_what_the_doors_cost(tmp_path, monkeypatch):
    module = load_page()
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    assert module.section("cpu", "summary") is None
    found = {
        "optimizer": [("ResNet-50, AdamW", "GQAdamW", 3.0), ("GPT-2 small, AdamW", "GQAdamW", 2.5),
                      ("10 000 tensors of 64, AdamW", "GQAdamW", 90.0)],
        "clusters": [("MLP, K = 8", "clusters", 1.4), ("MLP, K = 64", "clusters", 9.0),
                     ("MLP, few, K = 8", "clusters", 3.2)],
        "hook": [("ResNet-18", "n_clusters=None", 1.1)],
    }  # fmt: skip
    for theme, rows in found.items():
        lines = [Line(theme, case, step, ratio=ratio) for case, step, ratio in rows]
        (tmp_path / f"2026-11-29_cpu_{theme}.csv").write_text(as_csv(lines, {}))
    said = " ".join(module.section("cpu", "summary").split())
    assert "optimizers takes 2.5 to 3.0 times" in said
    assert "8 clusters 1.4 times as long as the plain step (3.2 times in small batches)" in said
    assert "DDP hook 1.1 times" in said


def test_the_tables_of_the_documentation_are_those_of_the_results():
    module = load_page()
    text = module.PAGE.read_text(encoding="utf-8")
    assert module.page(text) == text, "run `python benchmarks/page.py`"
