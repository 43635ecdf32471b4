"""A second family, written here, goes through the same seam: nothing outside export/families assumes BLIP."""

# ruff: noqa: ARG002  (the methods of a family have their parameters)

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig, ViTImageProcessor

from engine.bundle.manifest import TokenIds
from engine.captioner import Captioner
from engine.checkpoints.families import RULES
from engine.checkpoints.rules import ProcessorRules, Rules, Sizes
from engine.options import DecodeOptions
from export.bundle import export_bundle
from export.families import FAMILIES
from export.families.modules import DecoderStep, Encoder, Family
from export.reference.huggingface import Reference
from tests.helpers.tiny import IMAGE_SIZE, PATCH_SIZE, make_tokenizer, random_pictures


class VitEncoder(Encoder):
    parts = ("encoder", "decoder")

    def encode(self, pixels):
        return self.encoder(pixel_values=pixels).last_hidden_state

    def keys_values(self, encoded):
        for block in self.decoder.transformer.h:
            yield from block.crossattention.c_attn(encoded).split(encoded.shape[-1], 2)


class Gpt2Step(DecoderStep):
    parts = ("decoder",)

    def embed(self, ids, positions):
        return self.decoder.transformer.wte(ids.flatten()) + self.decoder.transformer.wpe(positions.flatten())

    def layer(self, index, x, cache):
        block = self.decoder.transformer.h[index]
        projected = block.attn.c_attn(block.ln_1(x)).split(x.shape[-1], -1)
        mixed, extended = self.self_attention(*(self.split_heads(part, cache.batch) for part in projected), cache)
        x = x + block.attn.c_proj(mixed)
        query = block.crossattention.q_attn(block.ln_cross_attn(x))
        x = x + block.crossattention.c_proj(self.cross_attention(self.split_heads(query, cache.batch), cache))
        return x + block.mlp(block.ln_2(x)), extended

    def logits(self, x):
        return self.decoder.lm_head(self.decoder.transformer.ln_f(x))


class VitGpt2Rules(Rules):
    name = "ViT with GPT-2"
    model_type, architecture = "vision-encoder-decoder", "VisionEncoderDecoderModel"
    weight_prefixes = ("encoder.", "decoder.")
    settings_part = "decoder"
    processor = ProcessorRules(
        kind="ViTImageProcessor",
        prefix="ViT",
        settings=RULES["blip"].processor.settings | {"resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
        without_effect=RULES["blip"].processor.without_effect,
    )

    def check_config(self, raw, path):
        pass

    def sizes(self, raw):
        text, vision = raw["decoder"], raw["encoder"]
        return Sizes(
            num_layers=text["n_layer"],
            num_heads=text["n_head"],
            head_width=text["n_embd"] // text["n_head"],
            vocab_size=text["vocab_size"],
            max_positions=text["n_positions"],
            encoder_positions=(vision["image_size"] // vision["patch_size"]) ** 2 + 1,
            image_size=vision["image_size"],
            tokens=TokenIds(raw["decoder_start_token_id"], raw["eos_token_id"], raw["pad_token_id"]),
        )

    def tied(self, raw):
        return {"decoder.lm_head.weight": "decoder.transformer.wte.weight"}

    def unsupported(self, raw):
        return {}


class VitGpt2(Family):
    """A ViT and a GPT-2 of the same width, with the tokenizer of the tiny BLIP."""

    rules = VitGpt2Rules()
    config_class, model_class = VisionEncoderDecoderConfig, VisionEncoderDecoderModel

    def resize(self, model, image_size):
        raise AssertionError("images of one size only")

    def make_processor(self, settings):
        return ViTImageProcessor(**settings)

    def encoder(self, model, normalisation):
        return VitEncoder(model, self.sizes(model.config), normalisation)

    def step(self, model):
        return Gpt2Step(model, self.sizes(model.config))

    def generation_config(self, model):
        return model.generation_config

    def prompt_arguments(self, tokenizer, prompt, images):
        if not prompt:
            return {}, 1
        ids = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        return {"decoder_input_ids": torch.tensor([ids]).repeat(images, 1)}, len(ids)

    def encode(self, model, pixel_values):
        return model.encoder(pixel_values=pixel_values).last_hidden_state

    def logits(self, model, ids, encoded):
        return model.decoder(input_ids=ids, encoder_hidden_states=encoded, use_cache=False).logits

    def ensemble(self, models, weights):
        raise AssertionError("one model only")


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILIES, "vision-encoder-decoder", VitGpt2())
    monkeypatch.setitem(RULES, "vision-encoder-decoder", VitGpt2.rules)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    tokenizer = make_tokenizer(folder)
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "sep", "pad")}
    vision = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    text = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=4)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text)
    config.decoder_start_token_id, config.eos_token_id, config.pad_token_id = ids["bos"], ids["sep"], ids["pad"]
    model = VisionEncoderDecoderModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25, generator=generator)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ViTImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}).save_pretrained(folder)
    return folder


def test_another_family_is_exported_and_equals_generate(checkpoint, tmp_path):
    bundle = export_bundle(checkpoint, tmp_path / "bundle", lambda _: None)  # replays its golden recordings
    captioner, reference = Captioner.load(bundle.path, backend="cpu"), Reference.load(checkpoint)
    pictures = random_pictures(6)
    captions = set()
    for prompt in (None, "a picture of the chest"):
        options = DecodeOptions(num_beams=3, max_new_tokens=15, no_repeat_ngram_size=3, prompt=prompt)
        expected = [best.ids for (best,) in reference.generate(reference.pixels(pictures), options)]
        assert [caption.ids for caption in captioner.caption(pictures, options)] == expected
        captions |= set(expected)
    assert len(captions) > 6, "the model ignores the images: the test shows little"
