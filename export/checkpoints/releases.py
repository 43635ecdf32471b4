"""What differs between releases 4 and 5 of transformers, in one place: the same names for both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import BertTokenizerFast

IS_5 = int(transformers.__version__.partition(".")[0]) >= 5

if IS_5:  # its BlipImageProcessor is torchvision's where that is installed, which resizes otherwise by a level or two
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil as BlipImageProcessor
else:
    from transformers import BlipImageProcessor

__all__ = ["IS_5", "BlipImageProcessor", "word_pieces"]


def word_pieces(vocabulary: Path, **settings: Any) -> BertTokenizerFast:
    """Return BERT's tokenizer of a vocab.txt, a word piece a line; release 5 takes the words themselves."""
    if not IS_5:
        return BertTokenizerFast(vocab_file=str(vocabulary), **settings)
    words = vocabulary.read_text(encoding="utf-8").splitlines()
    return BertTokenizerFast(vocab={word: number for number, word in enumerate(words)}, **settings)
