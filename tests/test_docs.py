"""The documentation says what the program does: commands, options, keys, columns, examples, links."""

import importlib.util
import inspect
import re
from pathlib import Path
from typing import get_args

import click
import pytest
import yaml
from typer.main import get_command

from orchestrator.attempt_log import COPY_SECONDS
from orchestrator.cli import app
from orchestrator.consensus import SCOPES, consensus_table
from orchestrator.driver.retries import BACKOFF_SECONDS, RETRIES
from orchestrator.report.tables import TABLES
from orchestrator.runs import HEARTBEAT_SECONDS, STALE_SECONDS
from orchestrator.store.cache import CACHE, DEFAULT_LIMIT_GB, LIMIT
from orchestrator.store.remote import FETCHES
from orchestrator.sweep import SelectorName, load_sweep
from workers.config import POOLS, HealMode
from workers.lab.catalogue import CATALOGUE
from workers.lab.shapes import COUNTS
from workers.lab.speech import HELD_OUT, SPEAKERS
from workers.scoring import RESAMPLES
from workers.stages import STAGES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")])
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = get_command(app).commands


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(language: str) -> list:
    """Every fenced block of a language, as (page, text)."""
    return [
        pytest.param(page, match[1], id=f"{name_of(page)}:{text_of(page)[: match.start()].count(chr(10)) + 1}")
        for page in PAGES
        for match in re.finditer(rf"^```{language}\n(.*?)^```", text_of(page), re.M | re.S)
    ]  # fmt: skip


def part(page: str, heading: str) -> str:
    """A page's text under one heading, up to the next of the same or a higher rank."""
    rank = heading.split(" ")[0]
    _, found, rest = text_of(DOCS / page).partition(f"\n{heading}\n")
    assert found, f"{page} has no heading {heading!r}"
    return re.split(rf"^#{{1,{len(rank)}}} ", rest, maxsplit=1, flags=re.M)[0]


def first_cells(text: str) -> list[str]:
    """The names in backticks that begin the rows of a table."""
    return re.findall(r"^\| `([^`]+)`", text, re.M)


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", text_of(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def options(command: click.Command) -> set[str]:
    context = click.Context(command)
    return {
        name
        for parameter in command.get_params(context)
        if parameter.param_type_name == "option"
        for name in parameter.opts
        if name.startswith("--")
    }


# --- commands ------------------------------------------------------------------------------


def test_every_command_has_its_page_and_no_page_lacks_a_command():
    assert {page.stem for page in (DOCS / "commands").glob("*.md")} == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_page_names_every_option_and_no_other(name):
    page = text_of(DOCS / "commands" / f"{name}.md")
    table = first_cells(page)
    documented = {cell.split()[0] for cell in table if cell.startswith("--")}
    assert documented == options(COMMANDS[name])
    for argument in COMMANDS[name].params:
        if argument.param_type_name == "argument":
            assert (argument.metavar or argument.name).strip("[]").upper() in table
    assert page.startswith(f"# layersweep {name}\n")
    assert re.search(r"exit codes?", page, re.I)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_readme_lists_every_command(name):
    assert re.search(rf"^\| \[`layersweep {name}\b.*\(docs/commands/{name}\.md\)", README, re.M)


@pytest.mark.parametrize(("page", "script"), blocks("sh"))
def test_commands_in_examples_exist(page, script):
    for line in script.splitlines():
        words = line.split()
        if words[0].endswith("layersweep"):
            assert words[1] in COMMANDS, f"{name_of(page)}: {line}"
            known = options(COMMANDS[words[1]])
            used = {word.partition("=")[0] for word in words if word.startswith("--")}
            assert used <= known, f"{name_of(page)}: {line}"


def test_make_targets_that_are_named_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w.][\w./]*):", makefile, re.M))
    for page in PAGES:
        named = set(re.findall(r"(?:`|^)make ([\w.]+)", text_of(page), re.M))
        assert named <= targets, name_of(page)


def test_the_readme_lists_the_exit_codes():
    rows = dict(re.findall(r"^\| (\d+) \| (.+?) \|$", README, re.M))
    assert set(rows) == {"0", "1", "2", "3", "130"}


# --- examples ------------------------------------------------------------------------------


@pytest.mark.parametrize(("page", "text"), blocks("yaml"))
def test_yaml_examples_load(page, text, tmp_path):
    """Whole sweeps as they are; pieces of one put into the smoke sweep."""
    file = tmp_path / "example.yaml"
    if not text.startswith("name:"):
        smoke = yaml.safe_load(text_of(ROOT / "configs" / "smoke.yaml"))
        text = yaml.safe_dump({**smoke, **yaml.safe_load(text)})
    file.write_text(text, encoding="utf-8")
    assert load_sweep(file).models, name_of(page)


def test_there_is_an_example_of_a_whole_sweep_in_the_readme():
    assert re.search(r"^```yaml\nname:", README, re.M)


def test_the_readme_lists_the_configurations():
    listed = set(re.findall(r"^\| `(configs/[^`]+)`", README, re.M))
    assert listed == {name_of(path) for path in (ROOT / "configs").glob("*.yaml")}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), f"{name_of(page)}: {target}"
        if anchor:
            assert anchor in anchors(place), f"{name_of(page)}: {target}"


# --- the sweep file ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference():
    spec = importlib.util.spec_from_file_location("reference", DOCS / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_up_to_date(reference):
    page = text_of(DOCS / "sweep-file.md")
    assert page == reference.updated(page), "run python docs/reference.py"


def test_the_reference_keeps_no_meaning_that_a_docstring_gives_or_that_is_nobodys(reference):
    fields = {
        f"{path}.{name}".lstrip("."): field
        for path, model in reference.models()
        for name, field in model.model_fields.items()
    }
    assert set(reference.MEANINGS) <= set(fields)
    assert not [path for path in reference.MEANINGS if fields[path].description]


# --- definitions ---------------------------------------------------------------------------


@pytest.mark.parametrize("table", TABLES)
def test_every_column_is_documented_in_order(table):
    assert first_cells(part("definitions.md", f"### {table}")) == list(TABLES[table])


def test_scopes_pools_and_selectors_are_documented():
    assert first_cells(part("definitions.md", "## Agreement and the shared block")) == list(SCOPES)
    assert first_cells(part("definitions.md", "## Distance")) == list(POOLS)
    assert first_cells(part("definitions.md", "## Selectors")) == list(get_args(SelectorName))
    assert first_cells(part("definitions.md", "## Healing")) == list(get_args(HealMode))


def test_the_numbers_of_resamples_and_permutations_are_right():
    assert f"{RESAMPLES} resamples" in part("definitions.md", "## Scores")
    permutations = inspect.signature(consensus_table).parameters["permutations"].default
    agreement = part("definitions.md", "## Agreement and the shared block")
    assert f"({permutations} permutations)" in agreement


# --- architecture and lab ------------------------------------------------------------------


def test_every_stage_is_documented():
    assert first_cells(part("architecture.md", "## Stages")) == list(STAGES)


def test_retries_are_as_the_driver_does_them():
    rows = re.findall(
        r"^\| `([\w-]+)` \| .+? \| (\w+)(.*)\|$",
        part("architecture.md", "## Driver and leases"),
        re.M,
    )
    tries = {name: 0 if count == "none" else int(count) for name, count, _ in rows}
    assert {name: count for name, count in tries.items() if count} == RETRIES
    delays = [f"{BACKOFF_SECONDS * 2**i:g}" for i in range(RETRIES["transient"])]
    rests = {name: rest for name, _, rest in rows}
    assert f"after {', '.join(delays[:-1])} and {delays[-1]} s" in rests["transient"]


def test_the_lock_is_as_the_run_folder_keeps_it():
    text = part("architecture.md", "## Run folder")
    assert f"every {HEARTBEAT_SECONDS:g} s, stale after {STALE_SECONDS:g} s" in text


def test_the_cache_is_as_the_store_keeps_it():
    rows = re.findall(
        r"^\| `(\w+)` \| .+ \| `?([^`|]+?)`? \|$", part("stores.md", "## The cache"), re.M
    )
    assert dict(rows) == {CACHE: "~/.cache/layersweep", LIMIT: f"{DEFAULT_LIMIT_GB:g}"}
    assert f"{FETCHES} at a time" in part("stores.md", "## The cache")
    assert f"every {COPY_SECONDS:g} s" in part("stores.md", "## What lies in the bucket")


def test_every_lab_name_is_documented():
    page = text_of(DOCS / "lab.md")
    for name, item in CATALOGUE.items():
        assert f"`{name}`" in page
        if item.layers:
            assert re.search(rf"`{name}`.*\b{item.layers} layers", page), name


def test_the_labs_counts_are_right():
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \((\d+)\) \|", text_of(DOCS / "lab.md"), re.M)
    assert {split: int(count) for split, count, _ in rows} == COUNTS["full"]
    assert {split: int(count) for split, _, count in rows} == COUNTS["tiny"]
    assert f"| {len(SPEAKERS)} (2) |" in text_of(DOCS / "lab.md")
    assert f"| {len(HELD_OUT)} others" in text_of(DOCS / "lab.md")
