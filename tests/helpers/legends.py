"""Generate figure legends, and measure the ROUGE-1 of a perfect captioner whose words went through BLIP's tokenizer.

The organisers delete punctuation without leaving a space, so "t2 - weighted" counts as two words, while the
reference has one. The captions are generated from templates and a seed, in the style of figure legends.
"""

from __future__ import annotations

import random

from tokenizers import Tokenizer

from engine.bundle.manifest import demo_bundle
from engine.bundle.tokenizer import clean_up, detokenise
from engine.scoring.base import Items
from engine.scoring.overlap import Rouge1

MODALITIES = (
    "Contrast-enhanced CT",
    "Non-contrast computed tomography (CT)",
    "T2-weighted MRI",
    "T1-weighted, fat-suppressed MRI",
    "Chest X-ray",
    "Postero-anterior radiograph",
    "Follow-up PET/CT",
    "Trans-thoracic echocardiogram",
    "Gray-scale ultrasound",
    "Coronal 3D-reconstruction",
)
PLANES = ("axial view", "coronal section", "mid-sagittal plane", "four-chamber view", "antero-posterior view")
FINDINGS = (
    "a {size} cm hypo-dense lesion in the left lobe (white arrow)",
    "a well-defined, {size} × {size} mm mass",
    "ground-glass opacities in both lower lobes [arrows]",
    "Crohn's disease of the terminal ileum",
    "a right-sided pleural effusion (*)",
    "L{level}/L{next} disc herniation",
    "a filling defect of {size}% in the patient's left atrium",
    "no evidence of metastasis",
    "non-displaced fracture of the 5th metatarsal",
    "a {count}-year-old lesion measuring {size}:{size}",
    "dilatation of the common bile duct; stones are seen (arrow-head)",
)


def make_caption(rng: random.Random) -> str:
    """Return one generated figure legend."""

    def number() -> str:
        return rng.choice([f"{rng.uniform(0.4, 9.9):.1f}", str(rng.randint(1, 1500)), "1,200"])

    level = rng.randint(1, 4)
    findings = [
        rng.choice(FINDINGS).format(size=number(), count=rng.randint(2, 90), level=level, next=level + 1)
        for _ in range(rng.choice([1, 1, 1, 2]))
    ]
    modality, plane = rng.choice(MODALITIES), rng.choice(PLANES)
    return rng.choice(
        [
            f"{modality} showing {' and '.join(findings)}.",
            f"{modality}, {plane}: {', '.join(findings)}.",
            f"{modality} ({plane}) shows {' with '.join(findings)}",
        ]
    )


def measure(count: int, seed: int = 0) -> dict[str, float]:
    """Return the ROUGE-1 of a perfect captioner: without clean-up, with Hugging Face's, and with the engine's."""
    rng = random.Random(seed)
    references = [make_caption(rng) for _ in range(count)]
    tokenizer = Tokenizer.from_file(str(demo_bundle() / "tokenizer.json"))
    ids = [tokenizer.encode(reference, add_special_tokens=False).ids for reference in references]
    raw = [_joined(tokenizer, sequence) for sequence in ids]
    written = {
        "raw": raw,
        "hugging_face_clean_up": [clean_up(text) for text in raw],
        "ours": [detokenise(text) for text in raw],
    }
    rouge = Rouge1()
    names = [str(i) for i in range(count)]
    return {
        kind: round(rouge.measure(Items(names, texts, [(reference,) for reference in references])).value, 4)
        for kind, texts in written.items()
    }


def _joined(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Join word pieces without clean-up: with a space before every piece that does not continue a word."""
    pieces = [tokenizer.id_to_token(token) for token in ids]
    return " ".join(pieces).replace(" ##", "")
