"""examples/quickstart.ipynb, run in a kernel as people run it, on the embedded default."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)


def test_every_cell_runs_in_an_empty_folder(notebook, tmp_path, monkeypatch):
    """With few epochs and images (CAPT_QUICK=1), on one thread."""
    folder = tmp_path / "empty"
    folder.mkdir()
    paths = os.pathsep.join(filter(None, [str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]))
    for name, value in {
        "CAPT_QUICK": "1", "OMP_NUM_THREADS": "1", "IPYTHONDIR": str(tmp_path / "ipython"), "PYTHONPATH": paths,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    fresh = nbformat.from_dict(notebook)
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(
        fresh, timeout=240, kernel_name="python3", resources=resources
    ).execute()  # raises what a cell raises
    assert all(cell.execution_count for cell in fresh.cells if cell.cell_type == "code")
    outputs = [output for cell in fresh.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    shown = "".join("".join(output.get("data", {}).get("text/markdown", "")) for output in outputs)
    assert "the same logits, bit for bit" in text and "autoattack" in shown and "CAPT adapter for digits" in shown
    assert [path.name for path in folder.iterdir()] == ["outputs"]
    saved = {path.name for path in (folder / "outputs" / "quickstart" / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "README.md", "results.json", "evaluation.json"} <= saved


def test_it_is_kept_with_its_outputs_and_small(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert (EXAMPLES / "quickstart.ipynb").stat().st_size < 300_000


def test_it_says_how_to_install_and_needs_no_checkout(notebook):
    first, *others = notebook.cells
    assert "pip install" in first.source and "](" not in first.source
    assert not any("](../" in cell.source or "examples/" in cell.source for cell in others)
