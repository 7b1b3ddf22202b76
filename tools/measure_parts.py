"""Measure load time and memory of the weights of a whole model, its encoder and its decoder.

python tools/measure_parts.py [folder]    # by default a random model of about 60 million parameters
"""

import sys
import tempfile
import time
from pathlib import Path

from moss_train.model import MossAudioTokenizerConfig, MossAudioTokenizerModel


def random_model(folder: Path) -> None:
    """Write a random model in several shards to `folder`."""
    sizes = {"output_dimension": 512, "d_model": 512, "num_heads": 8}
    stages = [{"patch_size": 240, "num_layers": 4, **sizes}, {"patch_size": 8, "num_layers": 4, **sizes}]
    quantizer = {"rvq_dim": 512 // 2, "num_quantizers": 16, "codebook_size": 1024, "codebook_dim": 8}
    config = MossAudioTokenizerConfig.from_stages(24000, stages, quantizer)
    MossAudioTokenizerModel(config).save_pretrained(folder, max_shard_size="50MB")


def main() -> None:
    """Print one line per part."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(temporary)
        if len(sys.argv) == 1:
            random_model(folder)
        MossAudioTokenizerModel.from_pretrained(folder)  # imports are done before the first timed load
        for part in (None, "encoder", "decoder"):
            began, used = time.perf_counter(), time.process_time()
            model = MossAudioTokenizerModel.from_pretrained(folder, part=part)
            size = sum(parameter.nbytes for parameter in model.parameters())
            seconds, computing = time.perf_counter() - began, time.process_time() - used
            print(f"{part or 'whole':8} {size / 1e6:8.1f} MB  {seconds:6.2f} s, {computing:.2f} s of it computing")


if __name__ == "__main__":
    main()
