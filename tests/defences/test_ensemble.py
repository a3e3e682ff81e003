"""TTE: the mean logits of fixed views."""

import torch

from capt_peft.defences import Ensemble, Undefended


def logits_of(classifier, pixels):
    with torch.no_grad():
        return classifier(pixels)


def test_the_image_alone_gives_the_classifiers_own_logits(classifier, images):
    assert torch.equal(Ensemble(1).logits(Undefended(classifier), images), classifier(images))


def test_two_views_are_the_image_and_its_mirror_image(classifier, images):
    expected = (logits_of(classifier, images) + logits_of(classifier, images.flip(3))) / 2
    with torch.no_grad():
        torch.testing.assert_close(Ensemble(2).logits(Undefended(classifier), images), expected)


def test_crops_are_parts_of_the_image_on_the_mean_colour_and_their_mirror_images(adapter, images):
    views = [view(images) for view in Ensemble(9)._views(Undefended(adapter))]
    assert len(views) == 9
    mean = adapter.mean.expand(3, -1, 40, 40).clone()  # padded by 4 on each side
    mean[:, :, 4:36, 4:36] = images
    places = []
    for crop, mirrored in zip(views[2::2], views[3::2], strict=False):
        assert torch.equal(mirrored, crop.flip(3))
        found = [
            (y, x)
            for y in range(9)
            for x in range(9)
            if torch.allclose(mean[..., y : y + 32, x : x + 32], crop, atol=1e-6)
        ]
        places += found
        assert len(found) == 1
    assert len(set(places)) == 3  # 9 views: 2 of the image, 3 crops mirrored, 1 crop
    more = [view(images) for view in Ensemble(16)._views(Undefended(adapter))]
    assert all(torch.equal(a, b) for a, b in zip(views, more, strict=False))
