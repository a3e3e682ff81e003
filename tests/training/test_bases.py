"""Bases that are quantised, placed by `device_map` or swapped under: tuned, attacked and loaded again, or refused."""

import pytest
import torch
from helpers import TINY_CLIP, Quantised, shake
from peft import AutoPeftModel, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import load_peft_weights
from peft.utils.hotswap import hotswap_adapter
from torch import nn
from training_helpers import NAMES, adapter_of, make_model, make_task, make_trainer
from transformers import CLIPModel

from capt_peft import PGD, CaptConfig, ThreatModel, ZeroShotClassifier, evaluate
from capt_peft.attacks.base import pixel_gradient

PIXELS = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SPREAD = {
    "text_model": "cpu",
    "vision_model": "disk",
    "visual_projection": "cpu",
    "text_projection": "cpu",
    "logit_scale": "cpu",
}


def plain(**kwargs):
    return CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float32, **kwargs)


class Int8Linear(nn.Module):
    """As bitsandbytes' layers: another class in place of Linear, whose `weight` is integers."""

    @torch.no_grad()
    def __init__(self, linear):
        super().__init__()
        self.register_buffer("scale", linear.weight.abs().amax(1, keepdim=True) / 127)
        self.weight = nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, states):
        return nn.functional.linear(states, self.weight * self.scale, self.bias)


def in_layers():
    """A CLIP with layers of another class, as bitsandbytes makes it."""
    model = plain()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Int8Linear(child))
    return model


def in_weights():
    """A CLIP with weights of another class, as torchao makes it."""
    model = plain()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(Quantised(module.weight.data), requires_grad=False)
    return model


def gradient(classifier):
    return pixel_gradient(classifier, PIXELS, lambda logits: logits[:, 0])[2]


@pytest.mark.parametrize("quantised", [in_layers, in_weights])
def test_an_adapter_is_tuned_and_measured_on_a_quantised_base_and_loads_on_it_again(
    quantised, tmp_path, processor, caplog
):
    model = get_peft_model(quantised(), CaptConfig())
    trainer = make_trainer(tmp_path, processor, model=model, max_steps=2, eval_attack="pgd-2")
    before = adapter_of(trainer)
    trainer.train()
    assert all(not torch.equal(value, before[name]) for name, value in adapter_of(trainer).items())
    classifier = trainer.classifier.eval()
    bare, full = (ZeroShotClassifier(base, processor, NAMES).eval() for base in (quantised(), plain()))
    with torch.no_grad(), classifier.frozen() as frozen:
        assert torch.equal(frozen(PIXELS), bare(PIXELS))  # training has left the base as it was
        assert 0 < (bare(PIXELS) - full(PIXELS)).abs().max() < 1  # and it is quantised
    evaluation = evaluate(classifier, make_task()["validation"], [PGD(ThreatModel("linf", "4/255"), steps=2)])
    assert evaluation.clean.n == 12 and not next(s for s in evaluation.signs if s.name == "zero_gradients").raised
    model.save_pretrained(tmp_path / "adapter")
    caplog.clear()
    again = ZeroShotClassifier(PeftModel.from_pretrained(quantised(), tmp_path / "adapter"), processor, NAMES).eval()
    assert "fingerprint" not in caplog.text
    with torch.no_grad():
        assert torch.equal(again(PIXELS), classifier(PIXELS))
    PeftModel.from_pretrained(plain(), tmp_path / "adapter")
    assert "is put on" in caplog.text  # the accuracy on other weights is not that of the card


@pytest.mark.parametrize("quantised", [in_layers, in_weights])
def test_attacks_see_the_gradient_through_a_quantised_base(quantised, processor):
    expected, found = (gradient(ZeroShotClassifier(base, processor, NAMES).eval()) for base in (plain(), quantised()))
    assert torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.999


class FourBits:
    load_in_4bit = True

    def to_dict(self):
        return vars(type(self))


@pytest.mark.parametrize("settings", [{"load_in_4bit": True}, FourBits()], ids=["as stored", "as given"])
def test_four_bits_of_bitsandbytes_are_refused_on_a_cpu(settings, processor):
    base = plain()
    base.config.quantization_config = settings
    for use in (lambda: get_peft_model(base, CaptConfig()), lambda: ZeroShotClassifier(base, processor, NAMES)):
        with pytest.raises(
            ValueError, match=r"4 bits by bitsandbytes, which on a CPU gives no gradients, .* load_in_8bit=True"
        ):
            use()


def test_a_device_map_of_one_device_works_with_every_loader(tmp_path, processor):
    model = make_model()
    shake(model)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = ZeroShotClassifier(model.eval(), processor, NAMES)(PIXELS)
        for loaded in (
            AutoPeftModel.from_pretrained(tmp_path, device_map="auto"),
            CLIPModel.from_pretrained(tmp_path, device_map="auto"),
            PeftModel.from_pretrained(plain(device_map={"": "cpu"}), tmp_path),
            ZeroShotClassifier.from_pretrained(str(tmp_path), class_names=NAMES, device_map="cpu").model,
        ):
            assert torch.equal(ZeroShotClassifier(loaded.eval(), processor, NAMES)(PIXELS), expected)
    trainer = make_trainer(
        tmp_path, processor, model=get_peft_model(plain(device_map="auto"), CaptConfig()), max_steps=1
    )
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_model_that_is_spread_over_places_is_refused_by_every_loader(tmp_path, processor):
    make_model().save_pretrained(tmp_path)
    placed = {"device_map": SPREAD, "offload_folder": str(tmp_path / "offloaded")}
    for use in (
        lambda: ZeroShotClassifier(plain(**placed), processor, NAMES),
        lambda: get_peft_model(plain(**placed), CaptConfig()),
        lambda: PeftModel.from_pretrained(plain(**placed), tmp_path),
        lambda: AutoPeftModel.from_pretrained(tmp_path, **placed),
        lambda: ZeroShotClassifier.from_pretrained(str(tmp_path), class_names=NAMES, **placed),
    ):
        with pytest.raises(ValueError, match=r"over several places \(device_map: cpu, disk\), .*without device_map"):
            use()


def test_hot_swapping_is_refused_by_peft_and_loading_into_the_adapter_does_it(tmp_path):
    model, other = make_model(), make_model()
    shake(other)
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but CAPT was passed"):
        hotswap_adapter(model, str(tmp_path), adapter_name="default", torch_device="cpu")
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    set_peft_model_state_dict(model, load_peft_weights(str(tmp_path)))
    assert places == {name: p.data_ptr() for name, p in model.named_parameters()}  # so that nothing is compiled again
    for (name, value), (_, expected) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(value, expected), name
