"""Image-caption batches for BLIP, with the targets generation needs; knows nothing of optimisers."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label that torch's cross entropy skips (torch.nn.CrossEntropyLoss, ignore_index)."""


def collate_captions(
    tokenizer: PreTrainedTokenizerBase, captions: list[str], bos_token_id: int, max_tokens: int = 200
) -> dict[str, torch.Tensor]:
    """Tokenise captions into input_ids, attention_mask and labels, each i64[B,L].

    Two traps of Hugging Face's BLIP are avoided here: sequences from the processor start with [CLS] while
    generation starts with [DEC] (`bos_token_id`), and its loss does not mask padding; so the first id is [DEC]
    and padded labels are IGNORED. BlipTextLMHeadModel shifts the labels itself.
    """
    batch = tokenizer(captions, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
    input_ids, attention_mask = batch["input_ids"], batch["attention_mask"]
    input_ids[:, 0] = bos_token_id
    labels = input_ids.masked_fill(attention_mask == 0, IGNORED)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
