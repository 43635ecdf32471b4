"""SPICE as a plug-in of `engine score` (Anderson et al. 2016). NOT TESTED: this project has never run it with SPICE.

    engine score ... --metrics spice --plugin "spice=python examples/plugins/spice.py"

SPICE needs more than pycocoevalcap installs: its first run downloads Stanford CoreNLP 3.6 (about 400 MB) into
pycocoevalcap's own folder, and its jar is known to need Java 8 as `java` on the path and 8 GB of memory. This project
downloads nothing, so only the exchange with `engine score` is tested, with a stand-in for SPICE. Run it in an
environment of its own: `pip install pycocoevalcap`, then name that environment's python in --plugin.

The contract is in engine/scoring/plugin.py. Texts arrive as they were written, and go to SPICE's parser like that. The
score of an image is its F1. Where that is not a number, `engine score` names the image and gives SPICE no value.
"""

import contextlib
import json
import sys
from importlib.metadata import version


def main():
    """Answer the head and the items on stdin with a signature and a score each."""
    sys.stdin.readline()  # the head: nothing in it is needed here
    items = [json.loads(line) for line in sys.stdin]
    with contextlib.redirect_stdout(sys.stderr):  # it prints its progress, and stdout is for the answer
        from pycocoevalcap.spice.spice import Spice

        references = {place: item["references"] for place, item in enumerate(items)}
        candidates = {place: [item["candidate"]] for place, item in enumerate(items)}
        _, scores = Spice().compute_score(references, candidates)
    print(json.dumps({"signature": f"spice:F1|text:raw|pycocoevalcap:{version('pycocoevalcap')}"}))
    for item, score in zip(items, scores, strict=True):
        print(json.dumps({"id": item["id"], "score": float(score["All"]["f"])}))


if __name__ == "__main__":
    main()
