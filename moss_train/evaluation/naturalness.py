"""DNSMOS (arXiv 2010.15258): quality of speech without a reference, by the networks in the speechmos package."""

from dataclasses import dataclass

from moss_train.evaluation.metrics import Column, MetricError, Pair, missing_package, package_version

SAMPLING_RATE = 16_000


@dataclass(frozen=True)
class Dnsmos:
    """Overall, signal and background quality of the reconstruction and the original's overall quality, 1 to 5."""

    columns = (
        Column("dnsmos", "DNSMOS", True, is_speech_only=True),
        Column("dnsmos_original", "DNSMOS of the original", True, is_speech_only=True),
    )

    @property
    def description(self) -> str:
        """See `Metric`."""
        return f"speechmos {package_version('speechmos')}, 16 kHz"

    def missing(self) -> str | None:
        """See `Metric`."""
        reasons = (missing_package(name) for name in ("speechmos", "onnxruntime", "librosa"))
        return next((reason for reason in reasons if reason is not None), None)

    def score(self, pair: Pair) -> dict[str, float]:
        """See `Metric`; MetricError for clips without samples that differ."""
        from speechmos import dnsmos

        wanted, got = (audio.clamp(-1, 1).numpy() for audio in pair.at(SAMPLING_RATE))
        try:
            values = [float(dnsmos.run(audio, SAMPLING_RATE)["ovrl_mos"]) for audio in (got, wanted)]
        except (ValueError, ZeroDivisionError) as error:
            raise MetricError(f"DNSMOS: {error}") from error
        return dict(zip(("dnsmos", "dnsmos_original"), values, strict=True))
