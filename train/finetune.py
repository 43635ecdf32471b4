"""Fine-tune BLIP's text decoder on image features kept in memory; knows nothing of where they come from."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable

import torch
from transformers import BlipForConditionalGeneration, PreTrainedTokenizerBase

from train.data import collate_captions


def encode_images(
    model: BlipForConditionalGeneration, batches: Iterable[torch.Tensor], say: Callable[[str], None]
) -> torch.Tensor:
    """Run the frozen vision tower over pixel batches f32[B,3,H,W]; return features f16[N,S,D]."""
    features, start = [], time.perf_counter()
    with torch.inference_mode():
        for i, pixel_values in enumerate(batches):
            features.append(model.vision_model(pixel_values=pixel_values)[0].half())
            if i % 20 == 19:
                say(f"encoded {i + 1} batches in {time.perf_counter() - start:.0f} s")
    return torch.cat(features).clone()


def finetune_decoder(
    model: BlipForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    train: tuple[torch.Tensor, list[str]],
    valid: tuple[torch.Tensor, list[str]],
    say: Callable[[str], None],
    *,
    epochs: int,
    batch_size: int = 32,
    learning_rate: float = 3e-4,
    seed: int = 0,
) -> None:
    """Train the decoder in place with AdamW and a one-cycle schedule; keep the epoch with the lowest valid loss.

    `train` and `valid` are (features f16[N,S,D], N captions).
    """
    generator = torch.Generator().manual_seed(seed)
    decoder, bos = model.text_decoder, model.config.text_config.bos_token_id
    features, captions = train
    steps = epochs * -(-len(captions) // batch_size)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    best, best_state, start = float("inf"), None, time.perf_counter()
    for epoch in range(epochs):
        decoder.train()
        order = torch.randperm(len(captions), generator=generator)
        losses = []
        for chosen in order.split(batch_size):
            batch = collate_captions(tokenizer, [captions[i] for i in chosen], bos)
            loss = decoder(encoder_hidden_states=features[chosen].float(), **batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        valid_loss = evaluate_loss(model, tokenizer, *valid, batch_size=batch_size)
        say(
            f"epoch {epoch + 1}/{epochs}: train loss {sum(losses) / len(losses):.4f}, "
            f"valid loss {valid_loss:.4f}, {time.perf_counter() - start:.0f} s"
        )
        if valid_loss < best:
            best, best_state = valid_loss, copy.deepcopy(decoder.state_dict())
    assert best_state is not None
    decoder.load_state_dict(best_state)
    decoder.eval()


def evaluate_loss(
    model: BlipForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    features: torch.Tensor,
    captions: list[str],
    *,
    batch_size: int = 32,
) -> float:
    """Return the mean cross entropy a batch over (features f16[N,S,D], captions)."""
    decoder = model.text_decoder.eval()
    losses = []
    with torch.inference_mode():
        for i in range(0, len(captions), batch_size):
            batch = collate_captions(tokenizer, captions[i : i + batch_size], model.config.text_config.bos_token_id)
            encoded = features[i : i + batch_size].float()
            losses.append(decoder(encoder_hidden_states=encoded, **batch).loss.item())
    return sum(losses) / len(losses)
