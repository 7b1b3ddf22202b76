"""Use an exported folder with accelerate's offload; started by test_transformers_versions.py.

Arguments: the folder, a file with the expected results, a folder for offloaded weights.
"""

import sys

sys.modules["moss_train"] = None  # importing it fails from here on

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModel  # noqa: E402

folder, expected_path, offload = sys.argv[1:]
expected = load_file(expected_path)
audio, codes = expected["audio"], expected["codes"]
limits = {"cpu": "4MB"}  # the model has 11 MB; "auto" puts the rest on disk
model = AutoModel.from_pretrained(
    folder, trust_remote_code=True, device_map="auto", max_memory=limits, offload_folder=offload
).eval()
places = set(map(str, model.hf_device_map.values()))
assert places == {"cpu", "disk"}, places
assert any(parameter.device.type == "meta" for parameter in model.parameters())
found = model.encode(audio).audio_codes
assert torch.equal(found, codes), float((found == codes).float().mean())
torch.testing.assert_close(model.decode(codes).audio, expected["decoded"], atol=1e-5, rtol=1e-4)
frame = model.config.downsample_rate / model.config.sampling_rate
streamed = model.encode(audio, chunk_duration=frame).audio_codes
assert float((streamed == codes).float().mean()) >= 0.99  # chunks are rounded differently from whole clips
print(",".join(sorted(places)))
