"""Three captions with references for tests of metrics, and a helper that makes Items of texts."""

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
    tuples = [reference if isinstance(reference, tuple) else (reference,) for reference in references]
    return Items([str(i) for i in range(len(candidates))], candidates, tuples)


WORKED = items(CANDIDATES, REFERENCES)
