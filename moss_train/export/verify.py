"""Check this model folder, or another implementation of it, against stored codes and audio.

    python verify.py                           # this folder, with this installation of torch and transformers
    python verify.py --codes port.safetensors  # `codes` [levels, clips, frames] that a port made of the stored audio

The stored audio is `audio` in test_vectors/vectors.safetensors: 16-bit samples [clips, channels, T].
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any


def main() -> int:
    """Print one line per check; return 0 when all pass, 1 when one fails, 2 when nothing can be checked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent)
    parser.add_argument("--codes", type=Path, help="a safetensors file with the codes of another implementation")
    arguments = parser.parse_args()
    try:
        checks = compare(arguments.folder, arguments.codes)
    except Exception as error:  # those of safetensors share no other base
        print(
            f"cannot verify {arguments.folder}: {(str(error) or type(error).__name__).splitlines()[0]}", file=sys.stderr
        )
        return 2
    for text, passed in checks:
        print(f"{'passed' if passed else 'FAILED'}: {text}")
    return 0 if all(passed for _, passed in checks) else 1


def compare(folder: Path, codes_file: Path | None) -> list[tuple[str, bool]]:
    """Return each check as a sentence and whether it passed."""
    import torch
    from safetensors.torch import load_file

    record = json.loads((folder / "test_vectors" / "record.json").read_text())
    vectors = load_file(folder / "test_vectors" / "vectors.safetensors")
    expected, tolerances = vectors["codes"], record["tolerances"]
    digest = hashlib.sha256(expected.numpy().tobytes()).hexdigest()
    checks = [("the stored codes have their checksum", digest == record["codes_sha256"])]
    if codes_file is not None:
        return [*checks, same_codes(load_file(codes_file)["codes"], expected, tolerances["codes"])]
    for name, wanted in record["weights_sha256"].items():
        found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        checks.append((f"{name} has its checksum", found == wanted))
    from transformers import AutoModel

    try:
        model = AutoModel.from_pretrained(str(folder), trust_remote_code=True).eval()
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return [*checks, (f"the model can be loaded ({reason})", False)]
    with torch.no_grad():
        if model.part != "decoder":
            codes = model.encode(vectors["audio"].float() / 32768).audio_codes
            checks.append(same_codes(codes, expected, tolerances["codes"]))
        if "decoded" in vectors:
            audio = model.decode(expected[:, :1]).audio.float()[:, :1]
            difference = float((audio - vectors["decoded"]).abs().max() / vectors["decoded"].abs().max())
            text = f"decoded audio differs by {difference:.1e} of its peak, at most {tolerances['audio']:g} is allowed"
            checks.append((text, difference <= tolerances["audio"]))
    return checks


def same_codes(codes: Any, expected: Any, tolerance: float) -> tuple[str, bool]:
    """Compare codes [levels, clips, frames]."""
    if codes.shape != expected.shape:
        return f"codes have shape {tuple(codes.shape)}, expected {tuple(expected.shape)}", False
    equal = float((codes.to(expected.dtype) == expected).float().mean())
    return f"{equal:.2%} of the codes are equal, at least {tolerance:.0%} have to be", equal >= tolerance


if __name__ == "__main__":
    sys.exit(main())
