"""The site: it is built strictly and fetches nothing, and what its pages take from the code is what the code says."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from sparsetrain.recipe.describe import json_schema
from sparsetrain.recipe.schema import Recipe, TrainSection

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def generator() -> Iterator[Callable[[str], ModuleType]]:
    """Import a module of docs/generate."""
    sys.path.insert(0, str(DOCS / "generate"))
    yield importlib.import_module
    sys.path.remove(str(DOCS / "generate"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    pytest.importorskip("material", reason="the extra docs is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return folder


def test_the_site_is_built_strictly_and_fetches_nothing(site):
    pages = [*site.glob("*.html")]
    assert len(pages) > 30
    for page in pages:
        html = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)\b[^>]*\bsrc=[\"']?([^\"' >]+)", html)
        loaded += re.findall(r"<link\b(?![^>]*rel=[\"']?(?:canonical|next|prev))[^>]*\bhref=[\"']?([^\"' >]+)", html)
        assert not [address for address in loaded if re.match(r"(https?:)?//", address)], page.name
    for style in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?https?:", style.read_text(encoding="utf-8")), style.name


def test_llms_txt_lists_every_page_once(site):
    listed = re.findall(r"^- \[.+?\]\((.+?)\): \S", (site / "llms.txt").read_text(encoding="utf-8"), re.M)
    pages = {page.stem for page in site.glob("*.html")} - {"404", "index"}
    assert sorted(listed) == sorted(f"{page}.md" for page in pages)
    assert all((site / name).is_file() for name in listed)


def test_links_to_files_without_a_page_are_text(site):
    assert "](../" not in "".join(page.read_text(encoding="utf-8") for page in site.glob("*.md"))


def test_lists_are_lists_behind_a_table_too(site):
    pages = {page.name: re.findall(r"<p>(.*?)</p>", page.read_text("utf-8"), re.S) for page in site.glob("*.html")}
    assert [(name, text) for name, texts in pages.items() for text in texts if re.search(r"^- ", text, re.M)] == []


def test_drawings_are_part_of_the_page(site):
    html = (site / "power.html").read_text(encoding="utf-8")
    assert '<svg aria-label="what a block reads with power' in html
    assert "prefers-color-scheme:dark){svg" not in html


def test_the_recipe_reference_has_every_key_in_the_order_of_the_schema(generator):
    page = generator("recipe_reference").reference(json_schema())
    sections = re.findall(r"^## `(\w+)`", page, re.M)
    assert sections == [name for name in Recipe.model_fields if name in sections]
    assert {"model", "attention", "data", "train", "lora", "eval"} <= set(sections)
    keys = re.findall(r'id="train\.(\w+)"', page)
    assert keys == [name for name in TrainSection.model_fields if name not in ("optimizer", "profile")]
    assert 'id="train.optimizer.betas"' in page
    for definition in json_schema()["$defs"].values():
        for key, field in definition["properties"].items():
            assert "const" in field or re.search(rf'id="[\w.-]*\b{key}"|`[\w.\[\]]*\b{key}(\[\])?`', page), key


def test_the_python_reference_has_every_public_name(generator):
    import sparsetrain_kernels

    import sparsetrain

    page = generator("api_reference").reference()
    for module in (sparsetrain, sparsetrain_kernels):
        for name in module.__all__:
            assert name.startswith("_") or f"{{#{module.__name__}.{name}}}" in page, name
    assert ":meth:" not in page
    assert "``" not in page.replace("```", "")


def test_the_drawings_are_what_the_code_draws(generator):
    for name, drawn in generator("pictures").all_pictures().items():
        assert (DOCS / "images" / name).read_text(encoding="utf-8") == drawn, "run: python docs/generate/pictures.py"


def test_the_chart_crosses_where_the_tables_say(generator):
    drawn = generator("crossover").series()
    assert 1 < drawn["SparseK"][8192] < drawn["PowerAttention"][8192]
    assert all(speeds[131072] > speeds[32768] for speeds in drawn.values())


@pytest.mark.parametrize("name", ["ladder", "million", "exchange"])
def test_a_table_that_is_calculated_is_what_the_code_says(generator, name):
    found = generator(name)
    assert found.PAGE.read_text(encoding="utf-8") == found.page(), f"run: python docs/generate/{name}.py"


def test_the_evidence_as_json_is_what_the_pages_say(generator):
    evidence = generator("evidence")
    written = evidence.FILE.read_text(encoding="utf-8")
    assert written == evidence.content(), "run: python docs/generate/evidence.py"
    for table in json.loads(written):
        assert table["rows"], table["section"]
        assert table["commands"], table["section"]
        assert evidence.DATE.search(table["measured"]), table["section"]
        for row in table["rows"]:
            assert row["runs"], (table["section"], row)
            assert all(run["seeds"] and run["machine"] and evidence.DATE.fullmatch(run["date"]) for run in row["runs"])


MEASURED = """# Evidence

## Facts

    sparsetrain run recipes/evidence/relay.yaml train.seed=1
    python -m sparsetrain.recipes.evidence.relay relay --seed 2 --seed 3

100 documents, one H200, 2026-11-30.{more}

{comment}| pattern | found |
| --- | ---: |
| power | 85.0 / 84.0 |
| stride, seed 4 | 79.0 |
"""


def test_rows_of_the_evidence_say_their_seeds_machine_and_date(generator):
    def runs(more="", comment=""):
        said = comment and f"<!-- measured:\n{comment}\n-->\n\n"
        (table,) = generator("evidence").experiments("evidence.md", MEASURED.format(more=more, comment=said))
        return [row["runs"] for row in table["rows"]]

    card = {"machine": "one H200", "date": "2026-11-30"}
    assert runs() == [[{"seeds": [2, 3], **card}], [{"seeds": [4], **card}]]
    two = " Seed 3 ran on a shared CPU, 2026-12-01."
    with pytest.raises(ValueError, match=r"Facts, row 'power', seed 2: which machine\? .*'one H200', 'a shared CPU'"):
        runs(two)
    later = "- {seeds: [3], machine: a shared CPU, date: 2026-12-01}\n- {machine: one H200, date: 2026-11-30}"
    cpu = {"machine": "a shared CPU", "date": "2026-12-01"}
    assert runs(two, later) == [[{"seeds": [2], **card}, {"seeds": [3], **cpu}], [{"seeds": [4], **card}]]
    with pytest.raises(ValueError, match="row 'stride, seed 4', seed 4: the text does not tell of machine one H100"):
        runs(comment="- {rows: [stride], machine: one H100}")


@pytest.mark.parametrize("told", ["seeds 4, 5", "seeds 4 / 5", "seeds 4 and 5"])
def test_a_row_of_the_evidence_may_name_several_seeds(generator, told):
    text = MEASURED.format(more="", comment="").replace("seed 4", told)
    (table,) = generator("evidence").experiments("evidence.md", text)
    assert [[run["seeds"] for run in row["runs"]] for row in table["rows"]] == [[[2, 3]], [[4, 5]]]


@pytest.mark.parametrize("page", ["ladder.md", "power.md", "sparsek.md", "full.md", "decode-policies.md"])
def test_measured_figures_stand_on_the_page_that_is_linked(page):
    """Numbers with a fraction or a per cent in an item that links to a page of measurements."""
    text = (DOCS / page).read_text(encoding="utf-8")
    items = [item for item in re.findall(r"^- .+(?:\n  .+)*", text, re.M) if "](" in item]
    checked = 0
    for item in items:
        sources = [DOCS / name for name in re.findall(r"\]\(([a-z-]+\.md)#?", item)]
        told = "".join(source.read_text(encoding="utf-8") for source in sources)
        for number in re.findall(r"(?<![\w.,-])\d+\.\d+(?![\w.]*-)|\d+(?= %)", item):
            checked += 1
            assert re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", told), f"{number} of {item[:60]!r}"
    assert checked


def test_measured_figures_of_the_readme_stand_on_the_page_that_is_linked():
    told = (DOCS / "performance.md").read_text(encoding="utf-8")
    paragraphs = (ROOT / "README.md").read_text(encoding="utf-8").split("\n\n")
    numbers = [
        number
        for paragraph in paragraphs
        if "](docs/performance.md)" in paragraph
        for number in re.findall(r"(?<![\w.-])\d+\.\d+(?![\w.]*\d)", paragraph)
    ]
    assert len(numbers) > 5
    assert [number for number in numbers if not re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", told)] == []


def literals() -> list[str]:
    """Every text of the package, with ``…`` where a value is put in."""

    def text(node: ast.AST) -> str:
        if isinstance(node, ast.JoinedStr):
            return "".join(text(each) for each in node.values)
        return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "…"

    found = []
    for file in sorted((ROOT / "sparsetrain").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str)):
                found.append(" ".join(text(node).replace("%s", "…").split()))
    return found


def test_messages_of_the_troubleshooting_page_are_those_of_the_code():
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    # In two backticks where the message holds one.
    marked = re.findall(r"^\*\*(`+)(.+?)\1\*\*$", page, re.M)
    messages = [" ".join(message.split()) for _, message in marked]
    assert len(messages) == len(re.findall(r"^\*\*", page, re.M)) > 35
    assert not set(messages) - set(literals())
