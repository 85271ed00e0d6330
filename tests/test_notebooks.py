"""Notebooks: run strictly through papermill, and kept in one shape."""

import ast
import json
import os

import nbformat
import pytest

from workbench import notebooks
from workbench.errors import NotebookError, RunError
from workbench.notebooks import check_parameters, notebook_folder, notebook_names, run_notebook

PARAMETERS = """text: str = "plain"
other: str = ""
number: int = 3
share: float = 0.5
on: bool = False
"""
FINISH = "from workbench.notebooks import finish\n\nfinish()"
TEXTS = [
    "007",
    "true",
    "None",
    "1e5",
    'it\'s "quoted" \\',
    "two\nlines\r\n",
    "🎈 שלום \u2028",
    "{number}; import os",
]


def notebook(folder, *cells, name="small.ipynb", parameters=PARAMETERS):
    """Write a notebook of code cells, the first one tagged as parameters unless there are none."""
    made = [nbformat.v4.new_code_cell(source) for source in cells]
    if parameters is not None:
        made.insert(0, nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    made.insert(0, nbformat.v4.new_markdown_cell("# Title"))
    path = folder / name
    nbformat.write(nbformat.v4.new_notebook(cells=made), path)
    return path


def refuse_kernels(monkeypatch):
    import papermill

    def started(*_, **__):
        raise AssertionError("a kernel was started")

    monkeypatch.setattr(papermill, "execute_notebook", started)


# --- parameters, before a kernel starts ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["txt", "Text", "text\nimport os", "text=1;", "__name__", ""])
def test_an_unknown_parameter_is_refused_before_a_kernel_starts(tmp_path, monkeypatch, name):
    refuse_kernels(monkeypatch)
    with pytest.raises(NotebookError) as caught:
        run_notebook(str(notebook(tmp_path, FINISH)), {name: "x"}, out=tmp_path / "out")
    said = f"small.ipynb has no parameter {name!r}; it declares: text, other, number, share, on"
    assert str(caught.value) == said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("number", True, "int"),
        ("number", "3", "int"),
        ("number", 3.0, "int"),
        ("number", None, "int"),
        ("text", 7, "str"),
        ("text", None, "str"),
        ("text", ["a"], "str"),
        ("on", 1, "bool"),
        ("on", "true", "bool"),
        ("share", "0.5", "float"),
        ("share", True, "float"),
    ],
)
def test_a_parameter_of_another_type_is_refused_before_a_kernel_starts(
    tmp_path, monkeypatch, name, value, expected
):
    refuse_kernels(monkeypatch)
    kind = type(value).__name__
    with pytest.raises(
        NotebookError, match=f"parameter {name} must be {expected} like its default .*got {kind}"
    ):
        run_notebook(str(notebook(tmp_path, FINISH)), {name: value}, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_integer_is_welcome_where_a_float_is_declared(tmp_path):
    check_parameters(notebook(tmp_path, FINISH), {"share": 1, "number": 4, "on": True, "text": "x"})


def test_a_lone_surrogate_is_refused(tmp_path):
    with pytest.raises(NotebookError, match="parameter text holds a lone surrogate"):
        check_parameters(notebook(tmp_path, FINISH), {"text": "a\ud800"})


@pytest.mark.parametrize("source", ["x = open('y')", "import os", "x = [y for y in 'ab']", "f()", "x.y = 1"])
def test_a_parameters_cell_that_computes_is_refused(tmp_path, source):
    path = notebook(tmp_path, FINISH, parameters=source)
    with pytest.raises(NotebookError, match="the parameters cell may hold only names with literal values"):
        check_parameters(path, {})


def test_a_notebook_needs_exactly_one_parameters_cell(tmp_path):
    with pytest.raises(NotebookError, match="exactly one cell tagged 'parameters', it has 0"):
        check_parameters(notebook(tmp_path, FINISH, parameters=None), {})


def test_a_file_that_is_no_notebook_is_refused(tmp_path):
    (tmp_path / "broken.ipynb").write_text("{")
    with pytest.raises(NotebookError, match=r"cannot read the notebook .*broken\.ipynb"):
        run_notebook(str(tmp_path / "broken.ipynb"), out=tmp_path)


def test_an_unknown_notebook_lists_those_there_are(tmp_path):
    for name in ("absent", "../x", str(tmp_path / "absent.ipynb")):
        with pytest.raises(
            NotebookError, match="no notebook named .*; there are: 00_start_here, 10_hyper_cl, 11"
        ):
            run_notebook(name, out=tmp_path)


def test_an_output_folder_that_cannot_be_written_is_refused_before_a_kernel_starts(tmp_path, monkeypatch):
    refuse_kernels(monkeypatch)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match="a file stands where a folder is needed"):
        run_notebook(str(notebook(tmp_path, FINISH)), out=tmp_path / "file")


# --- executed -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """A notebook that went well, below a folder whose name is hard on those who format paths."""
    folder = tmp_path_factory.mktemp("notebooks")
    show = "import json\n\nprint('RESULT ' + json.dumps([text, json.loads(other), number, share, on]))"
    bars = "from tqdm.notebook import tqdm\n\nsum(tqdm(range(5), desc='finished ' + 'bar'))"
    path = notebook(folder, show, "'<img src=x onerror=alert(1)>'", bars, FINISH)
    parameters = {"text": TEXTS[4], "other": json.dumps(TEXTS), "number": 0, "share": 2, "on": True}
    out = folder / "out {text} {0} {}"
    page = run_notebook(str(path), parameters, out=out, label="a-label")
    return out, page, parameters


def test_text_stays_the_text_it_is(executed):
    out, _, parameters = executed
    ran = nbformat.read(out / "notebooks" / "small-a-label.ipynb", as_version=4)
    printed = "".join(output.get("text", "") for cell in ran.cells for output in cell.get("outputs", []))
    result = json.loads(next(line for line in printed.splitlines() if line.startswith("RESULT "))[7:])
    assert result == [parameters["text"], TEXTS, 0, 2, True]


def test_a_notebook_that_went_well_leaves_a_notebook_and_a_page(executed):
    out, page, _ = executed
    assert page == out / "notebooks" / "small-a-label.html"
    assert sorted(os.listdir(out / "notebooks")) == ["small-a-label.html", "small-a-label.ipynb"]
    assert os.listdir(out.parent / "out {text} {0} {}") == ["notebooks"]


def test_the_page_needs_no_network(executed):
    page = executed[1].read_text()
    assert "Title" in page
    for start in ('src="http', "src='http", 'src="//', 'href="http', "@import", "url(http"):
        assert start not in page, start
    assert "<img src=x" not in page


def test_the_executed_notebook_names_no_private_path(executed):
    out, _, _ = executed
    text = (out / "notebooks" / "small-a-label.ipynb").read_text()
    assert "input_path" not in text
    assert str(out) not in text


def test_finished_progress_bars_leave_nothing_on_the_page(executed):
    out, page, _ = executed
    assert "finished bar" in (out / "notebooks" / "small-a-label.ipynb").read_text()
    assert "finished bar" not in page.read_text()
    assert "<pre>10</pre>" in page.read_text()  # what the cell gave is still there


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("raise KeyError('the kite\\nis gone')", r"cell \d+: KeyError: .*the kite"),
        ("import sys\n\nsys.exit(0)", r"SystemExit|no completion mark"),
        ("import os\n\nos.kill(os.getpid(), 9)", r"failed: the kernel died"),
    ],
)
def test_a_notebook_that_did_not_reach_its_end_is_a_failure(tmp_path, cell, message):
    path = notebook(tmp_path, cell, FINISH)
    with pytest.raises(NotebookError, match=message) as caught:
        run_notebook(str(path), out=tmp_path / "out")
    assert str(caught.value).startswith("small.ipynb failed: ")
    assert "\n" not in str(caught.value)
    left = os.listdir(tmp_path / "out" / "notebooks")
    assert set(left) <= {"small.failed.ipynb"}  # nothing that looks finished


def test_a_last_cell_without_the_mark_is_a_failure_and_keeps_the_last_good_result(tmp_path, monkeypatch):
    import papermill

    folder = tmp_path / "out" / "notebooks"
    folder.mkdir(parents=True)
    (folder / "small.html").write_text("the last good page")

    def ends_early(source, target, **_):
        nbformat.write(nbformat.read(source, as_version=4), target)

    monkeypatch.setattr(papermill, "execute_notebook", ends_early)
    with pytest.raises(NotebookError, match=r"ended before its last cell \(no completion mark\)"):
        run_notebook(str(notebook(tmp_path, FINISH)), out=tmp_path / "out")
    assert (folder / "small.html").read_text() == "the last good page"
    assert sorted(os.listdir(folder)) == ["small.failed.ipynb", "small.html"]


def test_success_clears_the_failure_before_it(tmp_path, monkeypatch):
    import papermill

    folder = tmp_path / "out" / "notebooks"
    folder.mkdir(parents=True)
    (folder / "small.failed.ipynb").write_text("{}")

    def works(source, target, **_):
        ran = nbformat.read(source, as_version=4)
        ran.cells[-1].outputs = [nbformat.v4.new_output("stream", text=notebooks.DONE + "\n")]
        nbformat.write(ran, target)

    monkeypatch.setattr(papermill, "execute_notebook", works)
    run_notebook(str(notebook(tmp_path, FINISH)), out=tmp_path / "out")
    assert sorted(os.listdir(folder)) == ["small.html", "small.ipynb"]


# --- the shape of the notebooks -----------------------------------------------------------------------------


def test_the_notebooks_that_recipes_name_exist():
    from workbench.config import recipe_names
    from workbench.papers import load_recipe

    named = {name for recipe in recipe_names() for name in load_recipe(recipe).notebooks}
    assert named
    assert named <= set(notebook_names())


@pytest.mark.parametrize("name", notebook_names())
class TestShape:
    def read(self, name):
        return nbformat.read(notebook_folder() / f"{name}.ipynb", as_version=4)

    def code(self, name):
        return [cell for cell in self.read(name).cells if cell.cell_type == "code"]

    def test_it_is_valid_and_small(self, name):
        nbformat.validate(self.read(name))
        assert (notebook_folder() / f"{name}.ipynb").stat().st_size < 60_000

    def test_its_title_comes_first(self, name):
        first = self.read(name).cells[0]
        assert first.cell_type == "markdown"
        assert first.source.startswith("# ")
        titles = [cell for cell in self.read(name).cells if cell.source.startswith("# ")]
        assert len(titles) == 1

    def test_one_cell_declares_typed_literals(self, name):
        tagged = [cell for cell in self.read(name).cells if "parameters" in cell.metadata.get("tags", [])]
        assert len(tagged) == 1
        statements = ast.parse(tagged[0].source).body
        assert statements
        for statement in statements:
            assert isinstance(statement, ast.AnnAssign), ast.unparse(statement)
            assert type(ast.literal_eval(statement.value)).__name__ == ast.unparse(statement.annotation)
        assert self.code(name)[0] is not None
        assert self.code(name)[0].source == tagged[0].source

    def test_it_holds_no_outputs_and_no_counts(self, name):
        assert all(not cell.outputs and cell.execution_count is None for cell in self.code(name))

    def test_it_defines_no_function_and_no_class(self, name):
        for cell in self.code(name):
            for node in ast.walk(ast.parse(cell.source)):
                assert not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)

    def test_its_last_code_cell_marks_it_complete(self, name):
        last = ast.parse(self.code(name)[-1].source).body[-1]
        assert ast.unparse(last) in {"finish()", "workbench.notebooks.finish()"}
        joined = "\n".join(cell.source for cell in self.code(name))
        assert "import finish" in joined or "workbench.notebooks" in joined
        assert joined.count("finish()") == 1
