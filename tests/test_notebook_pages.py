import re

import pytest

from workbench.notebooks import declared_parameters, notebook_folder, notebook_names, run_notebook
from workbench.papers import load_recipe

pytestmark = pytest.mark.notebook


@pytest.mark.parametrize("name", notebook_names())
def test_every_notebook_runs_top_to_bottom_on_the_tiny_recipe_and_its_page_needs_no_network(
    name, tiny_run, prepared
):
    out = tiny_run.folder.parent.parent
    recipe = tiny_run.recipe["name"]
    if name == "11_hyper_cl_kg":
        recipe = "hyper_cl_wn18rr_tiny"
        prepared(load_recipe(recipe).data.name)
    parameters = {"recipe": recipe, "out": str(out), "live": False}
    declared = declared_parameters(notebook_folder() / f"{name}.ipynb")
    page = run_notebook(name, {key: value for key, value in parameters.items() if key in declared}, out=out)
    text = page.read_text(encoding="utf-8")
    assert "notebook complete" in text
    assert text.count("Plotly.newPlot") >= 3
    assert not re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=[\"']https?://[^>]*>", text)
