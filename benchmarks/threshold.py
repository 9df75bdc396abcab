"""The strictest verifier that drawn truth passes, plain and through the decoder, by the overlap that it asks for.

`python benchmarks/threshold.py [--json]`. The verifier's own value is the strictest of these at which at least 0.97 of
1,000 pictures pass after the autoencoder's round trip; test pictures play no part in it.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import torch
from diffusers import AutoencoderKL

from progrpo.zoo import WEIGHTS
from progrpo.zoo.networks import to_pictures, to_tensor
from progrpo.zoo.shapes import verifier
from progrpo.zoo.shapes.world import examples

MATCHES = (0.80, 0.82, 0.84, 0.86, 0.88, 0.90)


@torch.no_grad()
def measure(pictures: int) -> dict[str, dict[str, float]]:
    vae = AutoencoderKL.from_pretrained(WEIGHTS / "shapes-flow" / "vae")
    prompts, drawn = examples("validation", pictures, seed=11)
    parts = [vae.decode(vae.encode(x).latent_dist.mode()).sample for x in to_tensor(drawn).split(64)]
    decoded = np.concatenate([to_pictures(x) for x in parts])
    result, own = {}, verifier._MATCH
    for match in MATCHES:
        verifier._MATCH = match
        shares = [float(np.mean([v.strict for v in verifier.verify(p, prompts)])) for p in (drawn, decoded)]
        result[f"{match:.2f}"] = dict(zip(("drawn_strict", "round_trip_strict"), shares, strict=True))
    verifier._MATCH = own
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    options = parser.parse_args()
    result = measure(options.pictures)
    lines = (f"{m}  drawn {r['drawn_strict']:.3f}  round trip {r['round_trip_strict']:.3f}" for m, r in result.items())
    print(json.dumps(result) if options.json else "\n".join(lines))


if __name__ == "__main__":
    main()
