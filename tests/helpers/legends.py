"""Made-up figure legends, and what writing like a tokenizer costs: ROUGE-1 of a perfect captioner whose words went
through BLIP's tokenizer.

The organisers delete punctuation without leaving a space, so "t2 - weighted" counts as two words where the reference
has one. The captions are made up here, in the manner of figure legends, by templates and a seed.
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


def make_caption(chance: random.Random) -> str:
    """Return one made-up figure legend."""

    def number() -> str:
        return chance.choice([f"{chance.uniform(0.4, 9.9):.1f}", str(chance.randint(1, 1500)), "1,200"])

    level = chance.randint(1, 4)
    findings = [
        chance.choice(FINDINGS).format(size=number(), count=chance.randint(2, 90), level=level, next=level + 1)
        for _ in range(chance.choice([1, 1, 1, 2]))
    ]
    modality, plane = chance.choice(MODALITIES), chance.choice(PLANES)
    return chance.choice(
        [
            f"{modality} showing {' and '.join(findings)}.",
            f"{modality}, {plane}: {', '.join(findings)}.",
            f"{modality} ({plane}) shows {' with '.join(findings)}",
        ]
    )


def measure(count: int, seed: int = 0) -> dict[str, float]:
    """Return ROUGE-1 of a perfect captioner: as the tokenizer joins words, with Hugging Face's clean-up, and with
    ours.
    """
    chance = random.Random(seed)
    references = [make_caption(chance) for _ in range(count)]
    tokenizer = Tokenizer.from_file(str(demo_bundle() / "tokenizer.json"))
    ids = [tokenizer.encode(reference, add_special_tokens=False).ids for reference in references]
    raw = [_joined(tokenizer, one) for one in ids]
    written = {
        "raw": raw,
        "hugging_face_clean_up": [clean_up(one) for one in raw],
        "ours": [detokenise(one) for one in raw],
    }
    rouge = Rouge1()
    names = [str(i) for i in range(count)]
    return {
        kind: round(rouge.measure(Items(names, texts, [(reference,) for reference in references])).value, 4)
        for kind, texts in written.items()
    }


def _joined(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Join word pieces as decoding does before any clean-up: a space before every piece that does not continue a
    word.
    """
    pieces = [tokenizer.id_to_token(one) for one in ids]
    return " ".join(pieces).replace(" ##", "")
