"""How much of a clip passes through the model at a time."""

from moss_train.model import MossAudioTokenizerModel


def chunk_seconds(model: MossAudioTokenizerModel, streaming: bool, chunk_duration: float | None) -> float | None:
    """Seconds per streamed chunk, one frame where nothing is said; None for whole clips."""
    if chunk_duration is None and streaming:
        return 1 / model.config.frame_rate
    return chunk_duration
