"""Small data sets in the layouts that CoOp's users have."""

import json

from PIL import Image

from capt_peft.data.catalog import read_classes
from capt_peft.data.sources import AIRCRAFT


def picture(label):
    """An image that tells its label in the catalog, as red + 256 green."""
    return Image.new("RGB", (8, 8), (label % 256, label // 256, 0))


def write_folders(root, names, images=1):
    for label, name in names.items():
        (root / name).mkdir(parents=True)
        for number in range(images):
            picture(label).save(root / name / f"{number}.png")


def write_coop(item, root, labels=(0, 1), per_class=6):
    """A root in CoOp's layout, with images of these classes alone, of each of them one for `val` and one for `test`."""
    splits = {"train": [], "val": [], "test": []}
    (root / "images").mkdir(parents=True)
    suffix = "jpg" if item.coop_split == AIRCRAFT else "png"
    for label in labels:
        for number, split in enumerate(["train"] * (per_class - 2) + ["val", "test"]):
            name = f"{label}_{number}.{suffix}"
            picture(label).save(root / "images" / name, format="png")  # which tells its label exactly
            splits[split].append([name, label, item.class_names[label]])
    if item.coop_split != AIRCRAFT:
        spelled = {split: [[*of, name.replace(" ", "_")] for *of, name in rows] for split, rows in splits.items()}
        (root / item.coop_split).write_text(json.dumps(spelled))
        return root
    (root / "variants.txt").write_text("".join(f"{item.class_names[label]}\n" for label in labels))
    for split, rows in splits.items():
        lines = "".join(f"{name.removesuffix('.jpg')} {variant}\n" for name, _, variant in rows)
        (root / AIRCRAFT.replace("train", split)).write_text(lines)
    return root


def write_data_set(item, root, labels):
    """A data set of the paper suite below `root`, as CoOp's users have it, of these classes, with 16 training images each."""
    folder = root / item.coop_folder
    if item.coop_split:
        write_coop(item, folder, labels, per_class=18)
        return
    words = {
        label: str(label) if item.name == "imagenet_v2" else read_classes(item.classes)[label][1] for label in labels
    }
    splits = {"": 1} if item.shift_of else {"train": 20, "val": 1}  # of 20 a fifth becomes validation images
    for split, images in splits.items():
        write_folders(folder / item.coop_images / split, words, images)
