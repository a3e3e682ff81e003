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


def test_every_cell_runs(notebook, tmp_path, monkeypatch):
    """In a folder of its own, with few epochs and images (CAPT_QUICK=1), on one thread."""
    for name, value in {"CAPT_QUICK": "1", "OMP_NUM_THREADS": "1", "IPYTHONDIR": str(tmp_path / "ipython")}.items():
        monkeypatch.setenv(name, value)
    paths = [str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    fresh = nbformat.from_dict(notebook)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(
        fresh, timeout=240, kernel_name="python3", resources=resources
    ).execute()  # raises what a cell raises
    assert all(cell.execution_count for cell in fresh.cells if cell.cell_type == "code")
    text = "".join(output.get("text", "") for cell in fresh.cells for output in cell.get("outputs", []))
    assert "the same logits, bit for bit" in text
    assert (tmp_path / "outputs" / "quickstart" / "adapter" / "adapter_model.safetensors").is_file()


def test_it_is_kept_with_its_outputs_and_small(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert (EXAMPLES / "quickstart.ipynb").stat().st_size < 300_000
