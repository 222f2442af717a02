from __future__ import annotations

import json
import re
from pathlib import Path

import composition
import kernels
import lowering
import parity
import published
import pytest
from programs import tables
from state_bytes import table, weigh
from step import markdown

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
MARK = re.compile(r"<!-- state-bytes -->\n(.*?)\n<!-- /state-bytes -->", re.DOTALL)


def test_the_program_runs():
    scope: dict[str, object] = {"__name__": "readme"}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(block, "README.md", "exec"), scope)
    metrics = scope["metrics"]
    assert isinstance(metrics, dict) and float(metrics["loss"]) < 5.0, "it learns the 26 letters of its 256 tokens"


def test_the_table_is_the_measured_one():
    rows = json.loads((ROOT / "benchmarks" / "results" / "state-bytes.json").read_text())["rows"]
    found = MARK.search(README)
    assert found is not None and found[1] == table(rows)
    assert weigh("base", 8, "bf16", 3) in rows


def test_the_table_of_the_step_is_the_measured_one():
    record = json.loads((ROOT / "benchmarks" / "results" / "step-cpu.json").read_text())
    assert f"<!-- step-cpu -->\n{markdown(record)}\n<!-- /step-cpu -->" in (ROOT / "docs" / "benchmarks.md").read_text()


@pytest.mark.parametrize(
    ("name", "table_of"), [("step-cpu-fp32", markdown), ("step-cuda", markdown), ("kernels-cuda", kernels.markdown)]
)
def test_the_tables_are_the_measured_ones(name, table_of):
    record = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    assert f"<!-- {name} -->\n{table_of(record)}\n<!-- /{name} -->" in text


def test_the_rates_of_kernels_on_a_gpu_are_the_measured_ones():
    record = json.loads((ROOT / "benchmarks" / "results" / "kernels-cuda-rates.json").read_text())
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    table = text.partition("<!-- kernels-cuda-rates -->\n")[2].partition("\n<!-- /kernels-cuda-rates -->")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    found = {name.strip("`"): figures for name, *figures in rows}
    assert found == {
        name: [f"{row['gigabytes_a_second']:,.0f}", f"{row['over_copy']:.2f}", f"{row['before']['over_copy']:.2f}"]
        for name, row in record["cases"].items()
    }


def test_the_profile_of_a_step_on_a_gpu_is_the_measured_one():
    record = json.loads((ROOT / "benchmarks" / "results" / "step-profile-cuda.json").read_text())["milliseconds"]
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    ours, theirs = record["fzero, inductor"], record["DDP, recorded"]
    assert f"{ours['kernel_milliseconds']:.1f} ms of kernels in {ours['kernels']} launches" in text
    assert f"against {theirs['kernel_milliseconds']:.1f} ms in {theirs['kernels']}" in text
    assert f"took {ours['ten_in_a_row']:.1f} ms each, PyTorch's {theirs['ten_in_a_row']:.1f}" in text


def test_the_table_of_the_lowering_is_the_measured_one():
    record = json.loads((ROOT / "benchmarks" / "results" / "lowering-cpu.json").read_text())
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    assert f"<!-- lowering -->\n{lowering.markdown(record)}\n<!-- /lowering -->" in text


def test_the_published_table_has_the_measured_figures():
    record = json.loads((ROOT / "benchmarks" / "results" / "published.json").read_text())
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    assert f"<!-- published -->\n{published.markdown(record)}\n<!-- /published -->" in text


@pytest.mark.parametrize("part", ["train", "small rates"])
def test_the_tables_of_low_precision_training_are_the_measured_ones(part):
    record = json.loads((ROOT / "benchmarks" / "results" / "parity.json").read_text())
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    assert f"<!-- parity {part} -->\n{parity.tables(record)[part]}\n<!-- /parity {part} -->" in text


def test_the_tables_of_composition_are_the_measured_ones():
    record = json.loads((ROOT / "benchmarks" / "results" / "composition-cpu.json").read_text())
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    assert f"<!-- composition -->\n{composition.markdown(record)}\n<!-- /composition -->" in text
    assert f"<!-- composition lora -->\n{composition.lora_markdown(record)}\n<!-- /composition lora -->" in text
    peaks = record["rows"]["two models"]["peak"]
    assert peaks[0] == pytest.approx(peaks[1], rel=1e-4), "two states have two step counters and two seeds"


@pytest.mark.parametrize("part", ["passes", "layouts", "worlds", "depths", "runs"])
def test_the_tables_of_programs_are_the_measured_ones(part):
    record = json.loads((ROOT / "benchmarks" / "results" / "programs.json").read_text())
    text = (ROOT / "docs" / "programs.md").read_text()
    assert f"<!-- {part} -->\n{tables(record)[part]}\n<!-- /{part} -->" in text


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKS = [(page, target) for page in PAGES for target in re.findall(r"\]\(([^)#]+)\)", page.read_text())]


@pytest.mark.parametrize(("page", "target"), LINKS, ids=[f"{page.name}-{target}" for page, target in LINKS])
def test_links_lead_somewhere(page, target):
    assert (page.parent / target).exists()
