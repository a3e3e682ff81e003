"""The published data sets that `load_task` knows by name: CoOp's eleven, the shifts of ImageNet, CIFAR-10 and -100.

Nothing here was guessed: `sources` names what was read for each entry, in stored public copies of the pages and
repositories and in the packages named, and what no source confirmed is None and said so in `docs/datasets.md`. The
class names of CoOp's data sets are those of its split files. Those of Food101, FGVCAircraft and SUN397 could not be
read; there they are a list of CoOp's names, whose words and order mmpretrain 1.2.0 confirms. ImageNet's are CLIP's
(open_clip 3.3.0). CLIP gives two names twice; of these the second "missile" is "projectile" here and the first
"sunglasses" is "sunglass", as in WordNet, because two classes with one text cannot be told apart.
"""

from __future__ import annotations

from pathlib import Path

from .catalog_coop import CLIP_NAMES, COOP, COOP_ENTRIES, HUB, MTEB, WNIDS
from .published import Entry

_BENCHMARK = "clip-benchmark 1.6.2 (datasets/builder.py, datasets/objectnet.py: column cls, order of the labels)"
_TEST = {"test": "test"}

_SHIFTS = (
    Entry(
        "imagenet_v2",
        "ImageNet-V2",
        1000,
        "imagenet",
        licence="as ImageNet's; images from Flickr under licences of their own",
        citation="Recht et al., Do ImageNet Classifiers Generalize to ImageNet?",
        sources=(COOP, "https://github.com/modestyachts/ImageNetV2 (README)", _BENCHMARK, CLIP_NAMES),
        hub_id="clip-benchmark/wds_imagenetv2",
        label_column="cls",
        splits=_TEST,
        coop_folder="imagenetv2",
        coop_images="imagenetv2-matched-frequency-format-val",
        shift_of="imagenet",
        labels_in_order=True,
        images="10,000",
        note="The matched-frequency set. The name of the image column is not confirmed; it is found by its type.",
    ),
    Entry(
        "imagenet_sketch",
        "ImageNet-Sketch",
        1000,
        "imagenet",
        licence="unknown (songweig/imagenet_sketch)",
        citation="Wang et al., Learning Robust Global Representations by Penalizing Local Predictive Power, "
        "arXiv 1905.13549, 2019",
        sources=(COOP, HUB + "songweig/imagenet_sketch (card)", _BENCHMARK, CLIP_NAMES),
        hub_id="clip-benchmark/wds_imagenet_sketch",
        label_column="cls",
        splits=_TEST,
        coop_folder="imagenet-sketch",
        coop_images="images",
        shift_of="imagenet",
        labels_in_order=True,
        note="The name of the image column is not confirmed; it is found by its type. The authors' README speaks of "
        "50,000 images.",
    ),
    Entry(
        "imagenet_a",
        "ImageNet-A",
        200,
        "imagenet_a",
        licence="MIT (barkermrl/imagenet-a)",
        citation="Hendrycks et al., Natural Adversarial Examples, CVPR 2021",
        sources=(
            COOP,
            "https://github.com/hendrycks/natural-adv-examples (eval.py: thousand_k_to_200)",
            "timm 1.0.31 (data/_info)",
            HUB + "barkermrl/imagenet-a (viewer, licence)",
        ),
        hub_id="barkermrl/imagenet-a",
        image_column="image",
        splits={"test": "train"},
        coop_folder="imagenet-adversarial",
        coop_images="imagenet-a",
        shift_of="imagenet",
        images="7,500",
        note="Its 200 classes alone are asked for, as its authors do. The Hub calls its only split `train`.",
    ),
    Entry(
        "imagenet_r",
        "ImageNet-R",
        200,
        "imagenet_r",
        licence="MIT (axiong/imagenet-r)",
        citation="Hendrycks et al., The Many Faces of Robustness: A Critical Analysis of Out-of-Distribution "
        "Generalization, ICCV 2021",
        sources=(COOP, WNIDS, HUB + "axiong/imagenet-r (card)"),
        hub_id="axiong/imagenet-r",
        image_column="image",
        label_column="wnid",
        splits=_TEST,
        coop_folder="imagenet-rendition",
        coop_images="imagenet-r",
        shift_of="imagenet",
        images="30,000",
        note="Its 200 classes alone are asked for, as its authors do.",
    ),
    Entry(
        "objectnet",
        "ObjectNet",
        113,
        "objectnet",
        licence="from CC BY 4.0, and never to tune a model's parameters; post images with their red border only",
        citation="Barbu et al., ObjectNet, NeurIPS 2019",
        sources=(
            "https://github.com/mlfoundations/wise-ft (src/datasets/objectnet_metadata: class names, folders)",
            HUB + "timm/objectnet-720p-in1k (licence)",
            _BENCHMARK,
        ),
        hub_id="clip-benchmark/wds_objectnet",
        label_column="cls",
        splits=_TEST,
        shift_of="imagenet",
        labels_in_order=True,
        note="The 113 classes that ImageNet has too, under ObjectNet's own names; some are several of ImageNet's. The "
        "red border is not cut off. The name of the image column is not confirmed; it is found by its type.",
    ),
)

_CIFAR = tuple(
    Entry(
        name,
        title,
        num_classes,
        name,
        licence=f"unknown (uoft-cs/{name})",
        citation="Krizhevsky, Learning multiple layers of features from tiny images, 2009",
        sources=(
            HUB + f"uoft-cs/{name} (files, licence)",
            f"https://tensorflow.org/datasets/community_catalog/huggingface/{name} (columns, splits, class names)",
            MTEB,
            "fusion-bench 0.2.33 (class names, template)",
        ),
        hub_id=f"uoft-cs/{name}",
        image_column="img",
        label_column=label_column,
        images="50,000 / 10,000",
        note=note,
    )
    for name, title, num_classes, label_column, note in (
        ("cifar10", "CIFAR-10", 10, "label", ""),
        ("cifar100", "CIFAR-100", 100, "fine_label", 'The Hub writes "cra" for "crab".'),
    )
)

CATALOG: dict[str, Entry] = {item.name: item for item in (*COOP_ENTRIES, *_SHIFTS, *_CIFAR)}


def entry(name: str) -> Entry:
    """Returns an entry of the catalog.

    Raises:
        KeyError: No entry of that name.
    """
    if name not in CATALOG:
        raise KeyError(f"{name!r} is not in the catalog. Names: {', '.join(CATALOG)}.")
    return CATALOG[name]


def subset_of(item: Entry) -> tuple[int, ...]:
    """Returns the labels that the classes of a shift have in the data set it is a shift of.

    ImageNet-A and -R give 200 of ImageNet's 1,000 labels: what picks their classes out of 1,000 logits.

    Raises:
        ValueError: The entry is no shift, or its classes are not classes of the other data set (ObjectNet).
    """
    names = CATALOG[item.shift_of].class_names if item.shift_of is not None else ()
    if not set(item.class_names) <= set(names):
        raise ValueError(f"{item.title} is no shift whose classes are classes of another entry, as ImageNet-A's are.")
    return tuple(names.index(name) for name in item.class_names)


def recognize(path: Path) -> Entry | None:
    """Returns the entry whose CoOp folder (or split file) `path` is, or None."""
    return next((item for item in CATALOG.values() if item.is_coop_root(path)), None)
