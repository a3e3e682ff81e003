"""SigLIPs with random weights, and tokenizers with their conventions, which cannot be downloaded here."""

from __future__ import annotations

import math

import torch
from peft import get_peft_model
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import SiglipConfig, SiglipModel, SiglipProcessor, TokenizersBackend
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from capt_peft import CaptConfig
from capt_peft.toy.images import FACTS

WORDS = ("a", "photo", "of", "the", "shape", "cat", "dog", *FACTS["color"], *FACTS["shape"])
SPECIAL = {1: ("<pad>", "</s>", "<unk>", "<2>", "<3>"), 2: ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")}
VOCABULARY = {word: i for i, word in enumerate((*SPECIAL[1], *dict.fromkeys(WORDS), ".", ","))}
END = 1  # in both families
LENGTH = 12
TEMPLATE_IDS = [VOCABULARY[word] for word in ("a", "photo", "of", "a")]


def siglip_tokenizer(family: int = 1) -> TokenizersBackend:
    """A vocabulary of words with the conventions of SigLIP's tokenizer (1), or of Gemma's (2), which SigLIP 2 has.

    The first makes texts lower case, drops punctuation and pads with the end token; the second does neither and pads with 0.
    """
    end, pad, unknown = (SPECIAL[family][i] for i in ((1, 1, 2) if family == 1 else (1, 0, 3)))
    vocabulary = {word: i for i, word in enumerate((*SPECIAL[family], *list(VOCABULARY)[5:]))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    if family == 1:
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex("[.,]"), "")])
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, END)])
    return TokenizersBackend(
        tokenizer_object=backend, eos_token=end, pad_token=pad, unk_token=unknown, model_input_names=["input_ids"]
    )


def siglip_processor(family: int = 1) -> SiglipProcessor:
    image_processor = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    return SiglipProcessor(image_processor=image_processor, tokenizer=siglip_tokenizer(family))


def random_siglip(
    seed: int = 0, text_layers: int = 3, vision_layers: int = 4, width: int = 32, patch: int = 8
) -> SiglipModel:
    """A SiglipModel of 32 x 32 pixels with random weights, and a configuration as the published ones have."""
    torch.manual_seed(seed)
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 4}
    text = {**shape, "num_hidden_layers": text_layers, "vocab_size": len(VOCABULARY), "max_position_embeddings": LENGTH}
    vision = {**shape, "num_hidden_layers": vision_layers, "image_size": 32, "patch_size": patch}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    with torch.no_grad():
        model.logit_scale.fill_(math.log(10))
        model.logit_bias.fill_(-10)
    return model.eval()


def siglip_inputs(names: tuple[str, ...] = ("cat", "red dog", "blue shape"), batch: int = 3) -> dict[str, torch.Tensor]:
    """Texts of the template and random images."""
    texts = [f"a photo of a {name}." for name in names]
    ids = siglip_tokenizer()(texts, padding="max_length", max_length=LENGTH, return_tensors="pt")["input_ids"]
    return {"input_ids": ids, "pixel_values": torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))}


def siglip_adapter(model: SiglipModel, seed: int = 1, **config):
    """The model with a CAPT adapter whose parameters are far from their start."""
    torch.manual_seed(seed)
    config = {"num_vision_tokens": config.get("num_text_tokens", 2), "template_token_ids": TEMPLATE_IDS, **config}
    peft_model = get_peft_model(model, CaptConfig(**config))
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return peft_model.eval()
