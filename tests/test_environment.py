"""The project as a whole: what it needs, what it imports, how it is laid out."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "workbench").rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def parsed(texts):
    found = {}
    for text in texts:
        requirement = Requirement(text)
        found[canonicalize_name(requirement.name)] = requirement
    return found


@pytest.fixture(scope="module")
def pinned():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    stated = [line.split("#")[0].strip() for line in lines]
    return {
        canonicalize_name(name): exact for name, _, exact in (line.partition("==") for line in stated if line)
    }


# --- dependencies -------------------------------------------------------------------------------------------


def test_the_conda_environment_lists_the_dependencies_of_the_package():
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    plain = [item for item in listed if isinstance(item, str)]
    [by_pip] = [item["pip"] for item in listed if isinstance(item, dict)]
    ours, theirs = parsed(PROJECT["dependencies"]), parsed(by_pip)
    assert {name: item.specifier for name, item in ours.items()} == {
        name: item.specifier for name, item in theirs.items()
    }
    assert len(by_pip) == len(PROJECT["dependencies"])
    assert f"python{PROJECT['requires-python']}" in [item.replace(" ", "") for item in plain]
    assert "pip" in plain


def test_every_dependency_is_pinned_exactly_within_its_bounds(pinned):
    wanted = parsed([*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]])
    for name, requirement in wanted.items():
        assert name in pinned, name
        assert re.fullmatch(r"[0-9][0-9a-z.+]*", pinned[name]), name
        assert requirement.specifier.contains(pinned[name]), f"{name}=={pinned[name]}"


def test_torch_and_torchvision_are_pinned_as_one_release_pair(pinned):
    assert version("torchvision").split("+")[0] == pinned["torchvision"].split("+")[0]
    asked = parsed(requires("torchvision"))["torch"].specifier
    assert asked.contains(pinned["torch"].split("+")[0])


def test_what_is_installed_meets_the_bounds():
    wanted = parsed([*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]])
    for name, requirement in wanted.items():
        try:
            assert requirement.specifier.contains(version(name)), name
        except PackageNotFoundError:
            pytest.fail(f"{name} is not installed")


# --- imports ------------------------------------------------------------------------------------------------


def test_importing_the_workbench_is_light():
    script = "import sys, workbench; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    heavy = {"torch", "panel", "plotly", "polars", "pandas", "numpy", "sklearn", "papermill", "transformers"}
    assert not heavy & set(found.stdout.split())


def test_the_public_names_are_there_and_an_unknown_one_lists_them():
    import workbench

    for name in workbench.__all__:
        assert getattr(workbench, name) is not None
    with pytest.raises(
        AttributeError, match="has no attribute 'Hypernetwork'; it has: ConditionedIndex, EmbeddingStore"
    ):
        _ = workbench.Hypernetwork


def imports_of(path):
    """The workbench modules that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name.startswith("workbench")}


def modules_below(folder):
    found = [path for path in SOURCES if (ROOT / "workbench" / folder) in path.parents]
    assert found
    return found


def test_papers_do_not_import_each_other():
    from workbench.papers import PAPERS

    for path in modules_below("papers"):
        own = [paper for paper in PAPERS if path.stem.startswith(paper)]
        for name in imports_of(path):
            module = name.removeprefix("workbench.papers.").split(".")[0]
            shared = module == "comparison" or path.stem in ("__init__", "comparison")
            if name.startswith("workbench.papers.") and not shared:
                assert own, path
                assert module.startswith(own[0]), f"{path.name} imports {name}"


def test_hypernetworks_know_no_paper_no_data_and_no_run():
    known = ("hypernetworks", "errors", "config", "files", "geometry.rank")
    allowed = tuple(f"workbench.{name}" for name in known)
    for path in modules_below("hypernetworks"):
        assert all(name.startswith(allowed) for name in imports_of(path)), path


def test_the_training_loop_knows_no_paper():
    for name in imports_of(ROOT / "workbench" / "training.py"):
        known = ("workbench.config", "workbench.errors", "workbench.files", "workbench.processes")
        assert name.startswith(known)


def test_nothing_imports_the_command_line():
    for path in SOURCES:
        if path.name != "__main__.py":
            assert not [name for name in imports_of(path) if name.startswith("workbench.cli")], path


def test_only_views_import_panel():
    for path in SOURCES:
        if not {"views", "apps"} & set(path.parts) and path.parts[-2:] != ("bench", "apps.py"):
            assert not re.search(r"^\s*(import panel|from panel)\b", path.read_text(), flags=re.M), path


# --- layout -------------------------------------------------------------------------------------------------


def project_files():
    """Tracked files and untracked ones that are not ignored; outside a checkout, the source folders."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=False,
    )  # fmt: skip
    if listed.returncode == 0:
        return [
            ROOT / name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file()
        ]
    folders = [ROOT / name for name in ("workbench", "tests", "notebooks", "data_manifests")]
    return [path for folder in folders for path in folder.rglob("*") if path.is_file()]


def test_no_file_names_a_path_of_this_machine():
    files = project_files()
    assert len(files) > 50
    places = {str(ROOT), sys.prefix, os.path.expanduser("~")} - {"/", "/usr", "/usr/local"}
    pattern = re.compile("|".join(rf"(?<![\w.~]){re.escape(place)}(?![\w-])" for place in places))
    for path in files:
        hit = pattern.search(path.read_bytes().decode("utf-8", errors="ignore"))
        assert hit is None, f"{path.relative_to(ROOT)}: {hit and hit.group()}"


def test_no_large_file_is_part_of_the_project():
    large = [path for path in project_files() if path.stat().st_size > 500_000]
    assert large == []


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(ROOT)) for path in SOURCES])
def test_files_and_functions_stay_readable(path):
    text = path.read_text()
    assert len(text.splitlines()) < 400
    tree = ast.parse(text)
    assert ast.get_docstring(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} in line {node.lineno}"
            assert len(node.args.args + node.args.kwonlyargs) <= 8, node.name


def test_no_module_is_named_for_nothing():
    assert not {path.stem for path in SOURCES} & {"utils", "util", "misc", "helpers", "common"}
