"""Measurements and findings of `inspect`, tested on clips made for this and against torchaudio's loudness."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torchaudio.functional

from moss_train.audio.io import read_audio, write_audio
from moss_train.audio.loudness import bandwidth, loudness, power_spectrum
from moss_train.commands import inspect as inspect_command
from moss_train.commands import pack as pack_command
from moss_train.config.schema import InspectConfig
from moss_train.data.inspect import ends_abruptly, find_clips_to_drop, inspect_folder, summarize
from recipes.quickstart.baselines import low_pass


@pytest.mark.parametrize("rate", [16000, 24000, 48000])
@pytest.mark.parametrize("frequency", [100, 997, 4000])
def test_loudness_is_that_of_the_standard(rate: int, frequency: int) -> None:
    time = torch.arange(rate * 3) / rate
    tone = 0.25 * torch.sin(2 * math.pi * frequency * time)[None]
    ours = loudness(power_spectrum(tone), rate)
    if frequency == 997:
        assert ours == pytest.approx(20 * math.log10(0.25) - 3.01, abs=0.05)  # a full-scale tone has -3.01 LUFS
    assert ours == pytest.approx(torchaudio.functional.loudness(tone, rate).item(), abs=0.3)


def test_loudness_of_speech_and_of_silence(recordings: Path) -> None:
    audio = torch.cat([read_audio(path)[0] for path in sorted((recordings / "speech").glob("librivox*"))], dim=1)
    ours = loudness(power_spectrum(audio), 24000)
    assert ours == pytest.approx(torchaudio.functional.loudness(audio, 24000).item(), abs=1.5)  # ours has no gate
    assert loudness(power_spectrum(audio * 0.5), 24000) == pytest.approx(ours - 6.02, abs=0.01)
    assert loudness(power_spectrum(torch.zeros(1, 100)), 24000) == -math.inf


@pytest.mark.parametrize("cutoff", [3000, 7000])
def test_bandwidth_finds_the_edge(recordings: Path, cutoff: int) -> None:
    audio, _ = read_audio(recordings / "music" / "loop_amen_full.flac")
    assert bandwidth(power_spectrum(audio), 24000) > 10_000
    assert bandwidth(power_spectrum(low_pass(audio, 24000, cutoff)), 24000) == pytest.approx(cutoff, rel=0.12)
    assert bandwidth(power_spectrum(torch.zeros(1, 5000)), 24000) == 0


def make_bad_corpus(folder: Path, recordings: Path) -> dict[str, str]:
    """Write a manifest with one clip of each bad kind, and return its path and the expected findings."""
    speech = sorted((recordings / "speech").glob("*.flac"))
    audio, rate = read_audio(speech[0])
    folder.mkdir()
    clips = {"good": audio, "copy": audio, "silent": audio * 1e-5, "clipped": (audio * 50).clamp(-1, 1)}
    clips["text"] = audio[:, :12000]
    lines = []
    for name, clip in clips.items():
        write_audio(folder / f"{name}.wav", clip, rate)
        text = "word " * 30 if name == "text" else "a few words"
        lines.append(f'{{"path": "{name}.wav", "id": "{name}", "text": "{text}", "language": "en"}}')
    (folder / "m.jsonl").write_text("\n".join(lines))
    return {"copy": "duplicate of good", "silent": "silent", "clipped": "clipped", "text": "text"}


def test_bad_clips_are_found_and_named(tmp_path: Path, pack_config, recordings: Path) -> None:
    expected = make_bad_corpus(tmp_path / "in", recordings)
    config = pack_config(input=tmp_path / "in" / "m.jsonl", out=tmp_path / "out", domain="speech")
    assert pack_command.run(config) == 0
    found = inspect_folder(tmp_path / "out", num_workers=1)
    assert found.problems == ()
    bad = find_clips_to_drop(found.clips, InspectConfig(["shards"], "out"))
    assert bad.keys() == expected.keys()
    assert all(bad[name].startswith(reason) for name, reason in expected.items())
    hours = summarize(found.clips)
    assert hours["language"]["en"] == pytest.approx(hours["domain"]["speech"]) == hours["task"]["asr"]


def test_clips_of_two_folders_with_the_same_id_are_not_confused(tmp_path: Path, pack_config, capsys) -> None:
    rng = np.random.default_rng(0)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for name, level in (("both", 0.1), ("silent in a", 0.0 if folder == "a" else 0.1)):
            audio = torch.from_numpy(rng.normal(0, level, (1, 24000)).astype(np.float32))
            write_audio(tmp_path / folder / f"{name}.wav", audio, 24000)
        write_audio(tmp_path / folder / f"only in {folder}.wav", torch.zeros(1, 24000), 24000)
        assert pack_command.run(pack_config(input=tmp_path / folder, out=tmp_path / f"{folder}.shards")) == 0
    shards = [str(tmp_path / "a.shards"), str(tmp_path / "b.shards")]
    assert inspect_command.run(InspectConfig(shards, str(tmp_path / "report"), num_workers=1)) == 0
    lines = (tmp_path / "report" / "drop.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["only in a.wav", "only in b.wav"]
    assert "1 id of them not in drop.jsonl" in capsys.readouterr().out


def test_a_cut_end_is_noticed(recordings: Path) -> None:
    audio, rate = read_audio(sorted((recordings / "speech").glob("librivox*"))[0])
    faded = torch.nn.functional.pad(audio, (0, 2400))
    assert not ends_abruptly(faded, rate)
    loudest = int(audio.abs().argmax())
    assert ends_abruptly(audio[:, : loudest + 60], rate)
