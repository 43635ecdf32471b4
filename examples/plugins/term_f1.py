"""A metric as a plug-in of `engine score`: F1 of the terms of a list that candidate and reference mention.

    engine score ... --metrics umls_f1 --plugin "umls_f1=python examples/plugins/term_f1.py terms.txt"

A stand-in for UMLS concept F1 where MedCAT and its licensed models are at hand only elsewhere: replace `concepts` by a
call of theirs. The contract is in engine/scoring/plugin.py; nothing but the standard library is needed.
"""

import json
import re
import sys
from pathlib import Path


def concepts(text, terms):
    """Return the terms that a text mentions as whole words."""
    words = " " + " ".join(re.findall(r"\w+", text.lower())) + " "
    return {term for term in terms if f" {term} " in words}


def f1(found, expected):
    """Return the harmonic mean of precision and recall of two sets; 1 where both are empty."""
    if not found and not expected:
        return 1.0
    return 2 * len(found & expected) / (len(found) + len(expected))


def main():
    """Answer the head and the items on stdin with a signature and a score each."""
    with Path(sys.argv[1]).open(encoding="utf-8") as stream:
        terms = {" ".join(re.findall(r"\w+", line.lower())) for line in stream if line.strip()}
    sys.stdin.readline()  # the head: nothing in it is needed here
    print(json.dumps({"signature": f"terms:{len(terms)}"}))
    for line in sys.stdin:
        item = json.loads(line)
        found = concepts(item["candidate"], terms)
        best = max(f1(found, concepts(reference, terms)) for reference in item["references"])
        print(json.dumps({"id": item["id"], "score": best}))


if __name__ == "__main__":
    main()
