"""Three captions with references, and items made of texts, for tests of metrics."""

from __future__ import annotations

from engine.scoring.base import Items

REFERENCES = [
    "computed tomography ct shows floating thrombosis white arrow",
    "early sagittal tnumberweighted mri",
    "chest xray showing cardiomegaly",
]


CANDIDATES = [
    "contrastenhanced computed tomography image of the aortic arch white arrow",
    "sagittal tnumberweighted mri of the thoracic spine",
    "chest xray showing cardiomegaly",
]


def items(candidates: list[str], references: list) -> Items:
    several = [reference if isinstance(reference, tuple) else (reference,) for reference in references]
    return Items([str(i) for i in range(len(candidates))], candidates, several)


WORKED = items(CANDIDATES, REFERENCES)
