"""Example of a plug-in for `engine score`: F1 of the terms from a list that candidate and reference mention.

    engine score ... --metrics umls_f1 --plugin "umls_f1=python examples/plugins/term_f1.py terms.txt"

Use it as a template for UMLS concept F1: replace `concepts` with a call of MedCAT, which needs licensed models. The
contract is documented in engine/scoring/plugin.py. Only the standard library is needed.
"""

import json
import re
import sys
from pathlib import Path


def concepts(text, terms):
    """Return the terms that occur in a text as whole words."""
    words = " " + " ".join(re.findall(r"\w+", text.lower())) + " "
    return {term for term in terms if f" {term} " in words}


def f1(predicted, expected):
    """Return the harmonic mean of precision and recall of two sets; 1 if both are empty."""
    if not predicted and not expected:
        return 1.0
    return 2 * len(predicted & expected) / (len(predicted) + len(expected))


def main():
    """Read the header and the items from stdin; print a signature and one score per item."""
    with Path(sys.argv[1]).open(encoding="utf-8") as stream:
        terms = {" ".join(re.findall(r"\w+", line.lower())) for line in stream if line.strip()}
    sys.stdin.readline()  # the header, which is not needed here
    print(json.dumps({"signature": f"terms:{len(terms)}"}))
    for line in sys.stdin:
        item = json.loads(line)
        predicted = concepts(item["candidate"], terms)
        best = max(f1(predicted, concepts(reference, terms)) for reference in item["references"])
        print(json.dumps({"id": item["id"], "score": best}))


if __name__ == "__main__":
    main()
