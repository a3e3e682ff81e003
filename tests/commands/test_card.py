"""`capt-peft card`: the card again, with what a person adds to it."""

import pytest
from huggingface_hub import ModelCard

from capt_peft.commands.card import main


def test_the_card_has_the_figures_and_what_was_added(adapter, capsys):
    main(
        [
            "--adapter",
            str(adapter),
            "--license",
            "mit",
            "--language",
            "en",
            "de",
            "--tags",
            "x-ray",
            "--dataset_tags",
            "me/lungs",
        ]
    )
    card = ModelCard((adapter / "README.md").read_text())
    assert capsys.readouterr().out == f"The card: {adapter / 'README.md'}\n"
    assert (card.data.license, card.data.language, card.data.datasets) == ("mit", ["en", "de"], ["me/lungs"])
    assert "x-ray" in card.data.tags and "43.6 (" in card.text


def test_what_was_added_stays_when_the_card_is_written_again(adapter):
    main(["--adapter", str(adapter), "--license", "mit", "--tags", "x-ray"])
    main(["--adapter", str(adapter), "--language", "en"])
    data = ModelCard((adapter / "README.md").read_text()).data
    assert data.license == "mit" and data.language == ["en"] and "x-ray" in data.tags
    main(["--adapter", str(adapter), "--license", "apache-2.0"])
    assert ModelCard((adapter / "README.md").read_text()).data.license == "apache-2.0"


def test_a_persons_card_is_replaced_only_with_overwrite(adapter):
    readme = adapter / "README.md"
    readme.write_text("# My adapter\n\nFor lungs.\n")
    with pytest.raises(ValueError, match=r"was written by a person. Give --overwrite to replace it"):
        main(["--adapter", str(adapter), "--license", "mit"])
    assert readme.read_text() == "# My adapter\n\nFor lungs.\n"
    main(["--adapter", str(adapter), "--license", "mit", "--overwrite"])
    assert "For lungs" not in readme.read_text() and ModelCard(readme.read_text()).data.license == "mit"


def test_figures_of_other_weights_are_refused_and_the_card_stays(adapter):
    before = (adapter / "README.md").read_text()
    record = adapter / "results.json"
    fingerprint = record.read_text().split('"fingerprint": "')[1].split('"')[0]
    record.write_text(record.read_text().replace(fingerprint, "0" * len(fingerprint)))
    with pytest.raises(ValueError, match=r"results\.json has the figures of other weights"):
        main(["--adapter", str(adapter)])
    assert (adapter / "README.md").read_text() == before
