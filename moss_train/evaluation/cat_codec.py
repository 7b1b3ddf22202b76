"""Our own model as a codec; apart from the protocol, so that the processes that score need not import transformers."""

import torch
from torch import Tensor

from moss_train.evaluation.codecs import weights_fingerprint
from moss_train.model import MossAudioTokenizerModel


class CatCodec:
    """A tokenizer of this package as a codec."""

    def __init__(self, model: MossAudioTokenizerModel, name: str) -> None:
        config = model.config
        self.name = name
        self.sampling_rate: int = config.sampling_rate
        self.num_channels: int = config.number_channels
        self.frame_rate: float = config.frame_rate
        self.codebook_sizes = (config.quantizer_kwargs["codebook_size"],) * config.num_quantizers
        self.fingerprint = weights_fingerprint(model)
        self._model = model.eval()

    def encode(self, audio: Tensor) -> Tensor:
        """See `Codec`."""
        codes = self._model.encode(audio[None], return_dict=True).audio_codes
        return codes[:, 0].cpu()

    def decode(self, codes: Tensor) -> Tensor:
        """See `Codec`."""
        with torch.inference_mode():
            return self._model.decode(codes[:, None], return_dict=True).audio[0].float().cpu()
