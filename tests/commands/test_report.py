"""`capt-peft report`: tables and plots of what benchmarks wrote."""

import pytest
from report.benchmark_lines import suite, write

from capt_peft.commands.report import main


def test_a_file_of_lines_becomes_a_folder_beside_it_and_the_tables_are_printed(tmp_path, capsys):
    lines = write(tmp_path / "toy.jsonl", suite(["shapes"], shots=(16,)))
    main(["--lines", str(lines)])
    told = capsys.readouterr().out
    folder = tmp_path / "toy"
    assert (folder / "tables.md").read_text() in told and "| capt |" in told
    listed = told.splitlines()[-len(list(folder.iterdir())) :]
    assert {folder / "tables.md", folder / "tables.tex", folder / "scatter.png"} < {*folder.iterdir()}
    assert sorted(listed) == sorted(map(str, folder.iterdir()))


def test_files_of_several_benchmarks_are_one_report_where_it_is_wanted(tmp_path, capsys):
    ours = write(tmp_path / "capt.jsonl", suite(["shapes"], shots=(16,), methods={"capt": (71, 43)}))
    theirs = write(tmp_path / "fap.jsonl", suite(["shapes"], shots=(16,), methods={"fap": (60, 25)}))
    main(["--lines", str(ours), str(theirs), "--output", str(tmp_path / "both")])
    told = capsys.readouterr().out.lower()
    assert "capt" in told and "fap" in told and str(tmp_path / "both" / "tables.md").lower() in told
    assert not (tmp_path / "capt").exists()


def test_a_file_in_the_place_of_the_folder_is_kept(tmp_path):
    lines = write(tmp_path / "toy", suite(["shapes"], shots=(16,)))  # without a suffix to take away
    before = lines.read_text()
    with pytest.raises(ValueError, match=r"toy is a file, but a folder is written. Give another --output"):
        main(["--lines", str(lines)])
    assert lines.read_text() == before
