import re

import pytest

from workbench.notebooks import declared_parameters, notebook_folder, notebook_names, run_notebook
from workbench.papers import load_recipe

pytestmark = pytest.mark.notebook


GRAPHS = ("11_hyper_cl_kg",)
RUNS = {
    "20_hyper_clip": "tiny_image_run",
    "40_fairness": "tiny_image_run",
    "30_hyper_align": "tiny_zoo_run",
    "51_families": "tiny_family_run",
}


@pytest.mark.parametrize("name", notebook_names())
def test_every_notebook_runs_top_to_bottom_on_the_tiny_recipe_and_its_page_needs_no_network(
    name, request, prepared
):
    run = request.getfixturevalue(RUNS.get(name, "tiny_run"))
    out, recipe = run.folder.parent.parent, run.recipe["name"]
    if name in GRAPHS:
        recipe = "hyper_cl_wn18rr_tiny"
        prepared(load_recipe(recipe).data.name)
    parameters = {"recipe": recipe, "image_recipe": "hyper_clip_scenes_tiny", "out": str(out), "live": False}
    declared = declared_parameters(notebook_folder() / f"{name}.ipynb")
    page = run_notebook(name, {key: value for key, value in parameters.items() if key in declared}, out=out)
    text = page.read_text(encoding="utf-8")
    assert "notebook complete" in text
    assert text.count("Plotly.newPlot") >= 3
    assert not re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=[\"']https?://[^>]*>", text)
