"""Notebooks through papermill, strictly: typed parameters, a completion mark, a page that opens offline.

papermill itself only warns about an unknown parameter and then runs on defaults, and calls every cell of a
notebook whose kernel died "completed". So parameters are checked here before a kernel starts, and a run
counts only if the notebook's last cell was executed and printed :data:`DONE`.
"""

import ast
import logging
import os
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

from workbench.errors import NotebookError
from workbench.files import check_writable, write_atomic

DONE = "notebook complete"
_FOREIGN_SCRIPT = re.compile(r"<script[^>]*\ssrc=[\"']https?://[^>]*>\s*</script>")
_MERMAID = re.compile(
    r"<script type=[\"']module[\"']>(?:(?!</script>).)*?mermaid(?:(?!</script>).)*?</script>", re.DOTALL
)
_WIDGET = "application/vnd.jupyter.widget-view+json"
_log = logging.getLogger(__name__)


def notebook_folder() -> Path:
    """Return the folder of the notebooks: beside the package in a checkout, inside it when installed."""
    package = Path(__file__).parent
    beside = package.parent / "notebooks"
    return beside if beside.is_dir() else package / "_shipped" / "notebooks"


def notebook_names() -> list[str]:
    """Return the names of the notebooks, sorted."""
    return sorted(path.stem for path in notebook_folder().glob("*.ipynb"))


def declared_parameters(path: Path) -> dict[str, Any]:
    """Read the names and default values in a notebook's cell tagged "parameters".

    Raises:
        NotebookError: there is no such cell, or it holds more than names with literal values.
    """
    import nbformat

    try:
        notebook = nbformat.read(path, as_version=4)
    except (OSError, ValueError) as problem:
        raise NotebookError(f"cannot read the notebook {path}: {problem}") from problem
    cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(cells) != 1:
        raise NotebookError(f"{path.name} needs exactly one cell tagged 'parameters', it has {len(cells)}")
    found = {}
    for statement in ast.parse(cells[0].source).body:
        target = (
            statement.target
            if isinstance(statement, ast.AnnAssign)
            else getattr(statement, "targets", [None])[0]
        )
        try:
            found[target.id] = ast.literal_eval(statement.value)
        except (AttributeError, ValueError) as problem:
            raise NotebookError(
                f"{path.name}: the parameters cell may hold only names with literal values"
            ) from problem
    return found


def check_parameters(path: Path, parameters: dict[str, Any]) -> None:
    """Check parameters against those a notebook declares.

    Raises:
        NotebookError: a name the notebook does not declare, or a value of another type than its default.
    """
    declared = declared_parameters(path)
    for name, value in parameters.items():
        if name not in declared:
            raise NotebookError(f"{path.name} has no parameter {name!r}; it declares: {', '.join(declared)}")
        expected = type(declared[name])
        fits = type(value) is expected or (expected is float and type(value) is int)
        if not fits:
            raise NotebookError(
                f"{path.name}: parameter {name} must be {expected.__name__} like its default "
                f"{declared[name]!r}, got {type(value).__name__}: {value!r}"
            )
        if isinstance(value, str) and any(0xD800 <= ord(letter) <= 0xDFFF for letter in value):
            raise NotebookError(
                f"{path.name}: parameter {name} holds a lone surrogate, which no file can store"
            )


def run_notebook(
    name: str,
    parameters: dict[str, Any] | None = None,
    *,
    out: Path | str = "reports",
    label: str = "",
    cell_timeout: int = 3600,
) -> Path:
    """Execute a notebook and publish it with its outputs, as .ipynb and as HTML that opens offline.

    Args:
        name: for example "10_hyper_cl", or the path of a notebook.
        parameters: values of declared parameters; text stays text, "007" and "true" too.
        out: output folder; the result goes to its folder ``notebooks``.
        label: added to the result's name, for example the recipe's.
        cell_timeout: seconds one cell may take.

    Returns:
        The path of the HTML page.

    Raises:
        NotebookError: no such notebook, a parameter it does not take, a cell that failed, a kernel that died,
            or a notebook that ended before its last cell. What was executed is kept beside, marked failed.
    """
    import papermill

    path = Path(name) if name.endswith(".ipynb") else notebook_folder() / f"{name}.ipynb"
    if not path.is_file():
        raise NotebookError(f"no notebook named {name[:80]!r}; there are: {', '.join(notebook_names())}")
    parameters = parameters or {}
    check_parameters(path, parameters)
    folder = Path(out) / "notebooks"
    check_writable(folder)
    final = folder / (f"{path.stem}-{label}" if label else path.stem)
    with tempfile.TemporaryDirectory(prefix="workbench-") as private:
        executed = Path(private) / "executed.ipynb"
        problem = ""
        try:
            papermill.execute_notebook(
                str(path), str(executed), parameters=parameters, progress_bar=True, log_output=False,
                execution_timeout=cell_timeout, cwd=str(Path.cwd()), kernel_name="python3",
                language="python",
            )  # fmt: skip
        except papermill.exceptions.PapermillExecutionError as error:
            problem = f"cell {error.exec_count}: {error.ename}: {error.evalue}"
        except Exception as error:  # noqa: BLE001 - nbclient and jupyter raise many kinds for a dead kernel
            known = {"DeadKernelError": "the kernel died", "CellTimeoutError": "a cell timed out"}
            name = type(error).__name__
            problem = f"{known.get(name, name)}: {error}"
        problem = problem or _incomplete(executed)
        if executed.is_file():
            text = _without_private_paths(executed)
            write_atomic(final.with_name(final.name + (".failed" if problem else "") + ".ipynb"), text)
        if problem:
            raise NotebookError(f"{path.name} failed: {' '.join(problem.split())[:500]}")
        write_atomic(final.with_name(final.name + ".html"), _html(executed))
    final.with_name(final.name + ".failed.ipynb").unlink(missing_ok=True)
    return final.with_name(final.name + ".html")


def _incomplete(executed: Path) -> str:
    """Say why an executed notebook does not count, or return an empty text."""
    import nbformat

    if not executed.is_file():
        return "nothing was executed"
    code = [cell for cell in nbformat.read(executed, as_version=4).cells if cell.cell_type == "code"]
    printed = "".join(output.get("text", "") for output in code[-1].outputs) if code else ""
    return "" if DONE in printed else "it ended before its last cell (no completion mark)"


def _without_private_paths(executed: Path) -> str:
    """Return the notebook's text without the absolute paths that papermill notes in it."""
    import nbformat

    notebook = nbformat.read(executed, as_version=4)
    for key in ("input_path", "output_path"):
        notebook.metadata.get("papermill", {}).pop(key, None)
    home = os.path.expanduser("~")
    text = nbformat.writes(notebook)
    return text.replace(home, "~") if len(home) > 1 else text


def _html(executed: Path) -> str:
    """Convert to one HTML page; plotly's figures bring their library with them."""
    import nbformat
    from nbconvert import HTMLExporter

    notebook = nbformat.read(executed, as_version=4)
    # Finished progress bars: they would load a widget library, and without it leave a line each.
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [one for one in cell.outputs if _WIDGET not in one.get("data", {})]
    exporter = HTMLExporter(template_name="classic", embed_images=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Your element with mimetype")  # JupyterLab-only outputs
        page, _ = exporter.from_notebook_node(notebook)
    # jQuery, MathJax and Mermaid would come from elsewhere; nothing here needs them, and the page is for
    # offline use.
    page = _FOREIGN_SCRIPT.sub("", page)
    return _MERMAID.sub("", page)


def finish() -> None:
    """Mark a notebook as complete; called in its last cell."""
    print(DONE)  # noqa: T201
