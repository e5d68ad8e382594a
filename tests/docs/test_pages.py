"""What the pages point to exists, and what they say of samplers, grids and flags is what the code has."""

import ast
import importlib
import json
import re

import pytest

from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import GRIDS
from ldm.util import get_obj_from_str
from tests.docs.pages import PAGES, ROOT, anchors, inline_code, links, table_rows

IDS = [str(p.relative_to(ROOT)) for p in PAGES]
FOLDERS = ("ldm", "scripts", "configs", "docs", "tests", "benchmarks", "models")
CALLS = {"n": lambda n: n, "n + 1": lambda n: n + (n > 1), "2 n - 1": lambda n: 2 * n - 1}


@pytest.mark.smoke
@pytest.mark.parametrize("path", PAGES, ids=IDS)
def test_every_relative_link_and_picture_exists(path):
    for link in links(path):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists() and target.is_relative_to(ROOT), f"{path.name}: {link} does not exist"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{path.name}: {link}: no such heading; there are {anchors(target)}"


@pytest.mark.smoke
@pytest.mark.parametrize("path", PAGES, ids=IDS)
def test_every_file_and_function_named_exists(path):
    """`ldm/x/y.py` is a file, `ldm/x/y.py:Class.method` is in it."""
    for text in inline_code(path):
        match = re.fullmatch(rf"((?:{'|'.join(FOLDERS)})/[\w./-]+|main\.py)(?::([\w.]+))?", text)
        if match is None or (match[1].startswith("models/") and not (ROOT / match[1]).exists()):
            continue
        assert (ROOT / match[1]).exists(), f"{path.name}: {text} does not exist"
        if match[2]:
            assert match[2] in definitions(ROOT / match[1]), f"{path.name}: {text} is not defined there"


def definitions(path):
    """Names of a file's functions, classes, methods and constants."""
    names = set()

    def visit(body, prefix):
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(prefix + node.name)
                visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names.update(prefix + t.id for t in targets if isinstance(t, ast.Name))

    visit(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return names


@pytest.mark.parametrize("path", PAGES, ids=IDS)
def test_every_dotted_name_resolves(path):
    for text in inline_code(path):
        if not re.fullmatch(r"ldm(\.\w+)+", text):
            continue
        try:
            importlib.import_module(text)
        except ModuleNotFoundError:
            assert get_obj_from_str(text) is not None, f"{path.name}: {text}"


@pytest.mark.smoke
def test_pages_are_found_from_the_index():
    listed = {(ROOT / "docs" / link.partition("#")[0]).resolve() for link in links(ROOT / "docs/index.md")}
    missing = {p for p in PAGES[1:] if p.name != "index.md"} - listed
    assert not missing, f"docs/index.md does not list {sorted(p.name for p in missing)}"


@pytest.mark.smoke
def test_pictures_are_small_and_all_of_them_are_shown():
    pictures = set((ROOT / "docs/images").glob("*"))
    assert sum(p.stat().st_size for p in pictures) < 1.5e6
    shown = {(p.parent / link).resolve() for p in PAGES for link in links(p)}
    assert pictures <= shown, f"no page shows {sorted(p.name for p in pictures - shown)}"


@pytest.mark.smoke
def test_the_sampler_table_is_the_code_s():
    rows = {r[0].strip("`"): r for r in table_rows(ROOT / "docs/sampling.md") if len(r) == 4}
    for name, sampler in SAMPLERS.items():
        assert name in rows, f"docs/sampling.md has no row for the sampler {name}"
        stated = CALLS[rows[name][2]]
        assert [stated(n) for n in (1, 2, 7)] == [sampler.calls(n) for n in (1, 2, 7)], name


@pytest.mark.smoke
def test_the_grid_table_is_the_code_s():
    rows = {r[0].strip("`") for r in table_rows(ROOT / "docs/sampling.md")}
    assert set(GRIDS) <= rows


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("module", "page"),
    [
        ("main", "training.md"),
        ("scripts.sample", "sampling.md"),
        ("scripts.evaluate", "evaluation.md"),
        *((f"scripts.{name}", "stable-diffusion.md") for name in ("txt2img", "img2img", "inpaint")),
        ("scripts.compare", "evaluation.md"),
        ("scripts.classify", "classification.md"),
    ],
)
def test_every_flag_is_explained(module, page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    for action in importlib.import_module(module).build_parser()._actions:
        names = [o for o in action.option_strings if o not in ("-h", "--help")]
        assert not names or any(f"`{n}" in text for n in names), f"docs/{page} does not explain {names}"


NUMBERS = r"\b(\d+|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve)\b"
# family of the report's table -> its name on the pages
FAMILIES = {"GAN": "GANs", "VAE": "VAE", "autoregressive": "transformer"}
FAMILIES |= {"diffusion": "diffusion", "latent diffusion": "latent diffusion"}


@pytest.mark.smoke
@pytest.mark.parametrize("report", ["report/index.html", "report/cifar10.html"])
def test_what_is_said_of_the_report_is_in_the_report(report):
    """Budget, number of runs and command are the report's own to say: another report would make the pages wrong."""
    html = (ROOT / "docs" / report).read_text(encoding="utf-8")
    html = re.sub(r"data:image[^\"]*", "", html)
    assert "Made by: python scripts/compare.py" in html and re.search(r"\d seconds|Taken as they were", html)
    said = []
    for page in (ROOT / "README.md", ROOT / "docs/evaluation.md"):
        paragraphs = re.split(r"\n\s*\n", page.read_text(encoding="utf-8"))
        said += [" ".join(p.split()) for p in paragraphs if report in p]
    assert len(said) == 2
    for paragraph in said:
        about = paragraph[paragraph.index(report) :]
        found = re.search(rf"{NUMBERS} (minutes|seconds|configs|runs)", about)
        assert not found, f"{found[0]!r} is for the report to say: {paragraph}"
    families = set(re.findall(r"<tr>\s*<td[^>]*>[^<]*</td>\s*<td[^>]*>([^<]*)</td>", html))
    assert families
    for family in families:
        assert FAMILIES[family] in said[0], f"README.md does not name the report's {family}"


@pytest.mark.smoke
def test_every_message_is_one_that_the_code_gives():
    """The messages in docs/troubleshooting.md, cut at `...` and at quoted values, stand in the sources."""
    files = [ROOT / "main.py", *(ROOT / "ldm").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]
    source = "\n".join(p.read_text(encoding="utf-8") for p in files)
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # a message that goes over several lines
    source = re.sub(r"\{[^{}]*\}", "...", source)
    for row in table_rows(ROOT / "docs/troubleshooting.md"):
        for part in re.split(r"\.{3,}|, got .*|\(did you mean", row[0].strip("`")):
            part = part.strip(" .:;,()")
            assert row[0] == "message" or part in source, f"{row[0]}: {part!r} is said nowhere"


@pytest.mark.smoke
def test_what_is_said_of_plain_and_residual_networks_is_in_their_rows():
    """docs/course.md: accuracy, training loss and minutes of the four runs on CIFAR-10."""
    page = " ".join((ROOT / "docs/course.md").read_text(encoding="utf-8").split())
    said = page[page.index("seed 23, 1,760 steps") : page.index("`results/depth_cifar10`")]
    names = ("resnet56", "resnet20", "plain56", "plain20")
    rows = [json.loads((ROOT / f"results/depth_cifar10/{name}.json").read_text()) for name in names]
    accuracies = [float(n) for n in re.findall(r"([\d.]+) %", said)]
    assert accuracies == [round(r["top1"], 1) for r in rows]
    losses = [float(n) for n in re.findall(r"\d\.\d\d(?! %)", said)]
    means = []
    for row in rows:
        last = [loss for step, loss in row["curves"]["train/loss"] if step >= 1760 * 4 // 5]
        means.append(sum(last) / len(last))
    assert losses == pytest.approx(means, abs=0.006)
    assert [round(r["minutes"]) for r in rows] == [14, 6, 14, 5]
    assert "five to six minutes with 20 layers, 14 with 56" in said
