"""What AIMET makes of a float graph and its encodings; run by a Python that has aimet-onnx, which need not be ours."""

from __future__ import annotations

import logging
import sys


def main(graph: str, encodings: str, images: str, outputs: str) -> None:
    """Simulate the graph on images and save its outputs."""
    import numpy as np
    import onnx
    from aimet_onnx.quantsim import QuantizationSimModel, load_encodings_to_sim

    logging.disable(logging.WARNING)
    sim = QuantizationSimModel(onnx.load(graph))
    # Not strict: bits and symmetry are those of the file, not those of the default configuration.
    load_encodings_to_sim(sim, encodings, strict=False)
    (given,) = sim.session.get_inputs()
    np.savez(outputs, *sim.session.run(None, {given.name: np.load(images)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
