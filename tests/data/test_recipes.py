"""The recipes' manifests, made from small trees in the published layouts with real audio, and packed."""

import functools
import http.server
import json
import os
import runpy
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from moss_train import load_config
from moss_train.audio.io import read_audio, write_audio
from moss_train.commands import pack as pack_command
from moss_train.utils.errors import UserError
from moss_train.utils.files import sha256_of
from tests.data.packed_clips import iterate_clips
from tests.local_server import serving

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def place(recordings: Path) -> Callable[[Path, int], Path]:
    """Return a function that puts a real sentence at a path, in the format of its suffix."""
    speech = sorted((recordings / "speech").glob("librivox*"))

    def put(path: Path, number: int = 0) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        audio, rate = read_audio(speech[number])
        write_audio(path, audio, rate)
        return path

    return put


@pytest.fixture
def prepare(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Run a recipe's script as from the command line; return its output, or its error message."""

    def run(recipe: str, *arguments: object, script: str = "prepare.py") -> str:
        script = str(RECIPES / recipe / script)
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            return str(end.code)
        return capsys.readouterr().out

    return run


def packed_labels(manifest: Path, tmp_path: Path, pack_config: Callable) -> dict[str, dict]:
    assert pack_command.run(pack_config(input=manifest, out=tmp_path / "shards")) == 0
    clips = iterate_clips([tmp_path / "shards"], sampling_rate=24000, num_channels=1)
    return {name: labels for name, _, labels in clips}


def test_librispeech(tmp_path: Path, place: Callable, prepare: Callable, pack_config: Callable) -> None:
    chapter = tmp_path / "LibriSpeech" / "test-clean" / "1089" / "134686"
    for number in range(2):
        place(chapter / f"1089-134686-000{number}.flac", number)
    (chapter / "1089-134686.trans.txt").write_text("1089-134686-0000 HE HOPED\n1089-134686-0001 THERE WOULD BE\n")
    assert "2 clips" in prepare("librispeech", tmp_path / "LibriSpeech", tmp_path / "out")
    labels = packed_labels(tmp_path / "out" / "test-clean.jsonl", tmp_path, pack_config)
    first = labels["test-clean/1089-134686-0000"]
    assert (first["text"], first["speaker"], first["task"]) == ("he hoped", "librispeech-1089", "asr")
    assert "no subset of LibriSpeech" in prepare("librispeech", tmp_path / "out", tmp_path / "x")


@pytest.mark.processes
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_archives_are_fetched_checked_and_packed(tmp_path: Path, place: Callable) -> None:
    chapter = tmp_path / "served" / "LibriSpeech" / "test-clean" / "1089" / "134686"
    place(chapter / "1089-134686-0000.flac")
    (chapter / "1089-134686.trans.txt").write_text("1089-134686-0000 HE HOPED\n")
    archive = tmp_path / "served" / "resources" / "12" / "test-clean.tar.gz"
    archive.parent.mkdir(parents=True)
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "served" / "LibriSpeech", "LibriSpeech")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "served"))

    def run(subset: str, sha256: str, server: str = "") -> subprocess.CompletedProcess:
        script = f"""set -euo pipefail
            declare -A sha256=([test-clean]={sha256})
            name=librispeech number=12 corpus=LibriSpeech; source recipes/openslr.sh; make_subsets {subset}"""
        variables = {"DATA": str(tmp_path / "data"), "PYTHON": sys.executable, "NO_PROXY": "*", "OPENSLR": server}
        environment = os.environ | variables | {"PYTHONPATH": str(RECIPES.parent)}
        return subprocess.run(
            ["bash", "-c", script], cwd=RECIPES.parent, env=environment, capture_output=True, text=True
        )

    with serving(handler) as server:
        wrong = run("test-clean", "0" * 64, server)
        assert wrong.returncode == 1
        assert "test-clean.tar.gz is not the published archive; remove it" in wrong.stderr
        (tmp_path / "data" / "downloads" / "librispeech-test-clean.tar.gz").unlink()
        done = run("test-clean", sha256_of(archive), server)
        assert done.returncode == 0, done.stderr
    assert run("test-clean", "0" * 64).returncode == 0  # nothing is left to download
    assert run("dev-clean", "0" * 64).returncode == 2
    clips = iterate_clips([tmp_path / "data/shards/librispeech-test-clean"], sampling_rate=24000, num_channels=1)
    assert [(name, labels["text"]) for name, _, labels in clips] == [("test-clean/1089-134686-0000", "he hoped")]


def test_libritts(tmp_path: Path, place: Callable, prepare: Callable, pack_config: Callable) -> None:
    chapter = tmp_path / "LibriTTS" / "dev-clean" / "84" / "121123"
    for number in range(2):
        place(chapter / f"84_121123_00000{number}_000000.wav", number)
    (chapter / "84_121123_000000_000000.normalized.txt").write_text("Maximilian.\n")
    assert "2 clips" in prepare("libritts", tmp_path / "LibriTTS", tmp_path / "out")
    labels = packed_labels(tmp_path / "out" / "dev-clean.jsonl", tmp_path, pack_config)
    assert labels["dev-clean/84_121123_000000_000000"]["text"] == "Maximilian."
    assert "text" not in labels["dev-clean/84_121123_000001_000000"]


def test_aishell2(tmp_path: Path, place: Callable, prepare: Callable, pack_config: Callable) -> None:
    part = tmp_path / "iOS" / "data"
    place(part / "wav" / "C0001" / "IC0001W0001.wav")
    (part / "wav.scp").write_text("IC0001W0001\twav/C0001/IC0001W0001.wav\n")
    (part / "trans.txt").write_text("IC0001W0001\t厨房用品\n", encoding="utf-8")
    assert "1 clips" in prepare("aishell2", part, tmp_path / "train.jsonl")
    (labels,) = packed_labels(tmp_path / "train.jsonl", tmp_path, pack_config).values()
    assert (labels["text"], labels["language"], labels["speaker"]) == ("厨房用品", "zh", "aishell2-C0001")
    with (part / "wav.scp").open("a") as file:
        file.write("IC0001W0002\twav/C0001/IC0001W0002.wav\n")
    assert "2 clips" in prepare("aishell2", part, tmp_path / "train.jsonl")
    with pytest.raises(UserError, match=r"no such file: .*IC0001W0002\.wav"):
        pack_command.run(pack_config(input=tmp_path / "train.jsonl", out=tmp_path / "missing"))


def test_audioset(tmp_path: Path, place: Callable, prepare: Callable, pack_config: Callable) -> None:
    (tmp_path / "eval_segments.csv").write_text(
        "# Segments csv created Sun Mar  5 10:54:25 2017\n# YTID, start_seconds, end_seconds, positive_labels\n"
        '--4gqARaEJE, 0.000, 10.000, "/m/068hy,/m/07q6cd_"\n--BfvyPmVMo, 20.000, 30.000, "/m/03l9g"\nno, 1, 2, "/m/x"\n'
    )
    (tmp_path / "labels.csv").write_text(
        'index,mid,display_name\n0,/m/068hy,"Domestic animals, pets"\n1,/m/07q6cd_,Squeak\n2,/m/03l9g,Hammer\n'
    )
    place(tmp_path / "audio" / "Y--4gqARaEJE.wav")
    place(tmp_path / "audio" / "--BfvyPmVMo_20.000.flac", 1)
    lists = (tmp_path / "eval_segments.csv", tmp_path / "labels.csv")
    done = prepare("audioset", *lists, tmp_path / "audio", tmp_path / "eval.jsonl")
    assert "2 clips, 1 segments without a file" in done
    labels = packed_labels(tmp_path / "eval.jsonl", tmp_path, pack_config)
    assert labels["--4gqARaEJE"]["text"] == "Domestic animals, pets, Squeak"
    assert labels["--BfvyPmVMo"]["task"] == "caption"


def test_musdb(tmp_path: Path, place: Callable, prepare: Callable, pack_config: Callable) -> None:
    track = place(tmp_path / "in" / "test" / "Artist - Song" / "mixture.wav")
    place(tmp_path / "in" / "train" / "A - B" / "mixture.wav", 1)
    place(track.with_name("vocals.wav"))
    assert "1 chunks" in prepare("musdb", tmp_path / "in", tmp_path / "out")
    labels = packed_labels(tmp_path / "out" / "test.jsonl", tmp_path, pack_config)
    assert {name: value["num_samples"] for name, value in labels.items()} == {"Artist - Song@0": 5 * 24000}
    assert json.loads((tmp_path / "out" / "train.jsonl").read_text())["id"] == "A - B"


def test_debian_audio(tmp_path: Path, place: Callable, prepare: Callable, pack_config: Callable) -> None:
    share = tmp_path / "unpacked" / "usr" / "share"
    stamp = place(share / "tuxpaint" / "stamps" / "cat_desc_fr.ogg.wav")
    stamp.rename(stamp.with_suffix(""))  # libsndfile detects the format from the content
    (stamp.parent / "cat.txt").write_text("A cat.\nfr.utf8=Un chat.\n", encoding="utf-8")
    place(share / "klettres" / "lt" / "alpha" / "a.wav", 1)
    (share / "klettres" / "lt" / "sounds.xml").write_text(
        '<klettres><sound name="Ą" file="lt/alpha/a.wav"/></klettres>'
    )
    librivox = share / "pocketsphinx" / "test" / "data" / "librivox"
    place(librivox / "austen-0870.wav", 2)
    (librivox / "transcription").write_text("<s> and mister john dashwood </s> (austen-0870)\n")
    done = prepare("debian_audio", tmp_path / "unpacked", tmp_path / "out")
    assert "heldout: 1 clips" in done
    found = [json.loads(line) for name in ("train", "heldout") for line in (tmp_path / "out" / f"{name}.jsonl").open()]
    texts = {entry["speaker"]: entry["text"] for entry in found}
    assert texts == {"tuxpaint-fr": "Un chat.", "klettres-lt": "Ą", "pocketsphinx-librivox": "and mister john dashwood"}
    assert [entry["speaker"] for entry in map(json.loads, (tmp_path / "out" / "heldout.jsonl").open())] == [
        "pocketsphinx-librivox"
    ]


def test_debian_audio_is_packed_with_and_without_texts(tmp_path: Path, prepare: Callable) -> None:
    clips = [
        {"id": "a", "path": "/x/a.ogg", "domain": "speech", "language": "fr", "text": "Un chat."},
        {"id": "b", "path": "/x/b.ogg", "domain": "speech", "language": "fr"},
        {
            "id": "c#0",
            "path": "/x/c.ogg",
            "domain": "music",
            "text": "a song",
            "start_seconds": 0.0,
            "end_seconds": 12.0,
        },
        {"id": "d", "path": "/x/d.wav", "domain": "sound", "text": "a bell"},
    ]
    heldout = [
        {"id": f"{domain}{i}", "path": "/x/h", "domain": domain} for i in range(30) for domain in ("speech", "sound")
    ]
    for name, entries in (("train", clips), ("heldout", heldout)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    done = prepare("debian_audio", tmp_path, script="mixture.py")
    assert "plain.jsonl: 4 clips" in done
    plain, text, validation = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").open()] for name in ("plain", "text", "validation")
    )
    assert plain == [{key: value for key, value in clip.items() if key != "text"} for clip in clips]
    assert [(clip["id"], clip["domain"], clip["task"]) for clip in text] == [
        ("a", "transcribed", "asr"),
        ("c#0", "captioned", "caption"),
        ("d", "captioned", "caption"),
    ]
    assert text[0]["text"] == "Un chat."
    assert [clip["domain"] for clip in validation] == ["speech"] * 20 + ["sound"] * 20


VOICES = {"kathleen": ("data/{}.wav", None), "kerstin": ("verified/{}.flac", 1), "nathalie": ("verified/{}.flac", 1)}


@pytest.fixture
def voice_repositories(tmp_path: Path, place: Callable) -> Path:
    """Create small repositories of the three voices, each with a held-out, a training and a repeated text."""
    heldout = (RECIPES / "cc0_voices" / "heldout.txt").read_text().split()
    for voice, (pattern, has_table) in VOICES.items():
        root = tmp_path / "served" / f"dataset-voice-{voice}"
        held = next(name for name in heldout if name.startswith(voice)).removeprefix(f"{voice}_")
        texts = {held: "Held out.", "again": "Held out.", "seen": f"Seen by {voice}."}
        for number, (name, text) in enumerate(texts.items()):
            path = place(root / pattern.format(name), number % 2)
            if not has_table:
                path.with_suffix(".txt").write_text(text + "\n")
        place(root / "audio" / "not_wanted.wav")
        if has_table:
            (root / "metadata.csv").write_text("".join(f"{name}|{text}\n" for name, text in texts.items()))
        for command in (
            ["init", "--quiet"],
            ["add", "."],
            ["-c", "user.name=x", "-c", "user.email=x@example.org", "commit", "--quiet", "-m", "x"],
            ["config", "uploadpack.allowFilter", "true"],
            ["config", "uploadpack.allowAnySHA1InWant", "true"],
        ):
            subprocess.run(["git", *command], cwd=root, check=True)
    return tmp_path / "served"


@pytest.mark.processes
@pytest.mark.nightly
def test_cc0_voices_are_cloned_checked_split_and_packed(tmp_path: Path, voice_repositories: Path) -> None:
    """The recipe's own script, with counts and held-out list changed for the small repositories."""
    recipe = tmp_path / "checkout" / "recipes" / "cc0_voices"
    shutil.copytree(RECIPES / "cc0_voices", recipe)
    data = tmp_path / "data"
    variables = {
        "PYTHON": sys.executable,
        "PYTHONPATH": str(RECIPES.parent),
        "CC0_MIRROR": f"file://{voice_repositories}",
    }

    def run(**more: str) -> subprocess.CompletedProcess:
        environment = os.environ | variables | more
        return subprocess.run(["bash", recipe / "run.sh", data], env=environment, capture_output=True, text=True)

    few = run()
    assert few.returncode == 1
    assert "has 3 recordings with a text instead of 1593" in few.stderr
    assert not list(data.glob("clones/*/audio"))  # sparse checkout

    shutil.rmtree(data / "clones" / "dataset-voice-kerstin" / "verified")  # as if interrupted
    (data / "clones" / "dataset-voice-kerstin" / ".complete").unlink()
    script = (recipe / "prepare.py").read_text()
    for count in ("1593", "1359", "1115"):
        script = script.replace(count, "3")
    (recipe / "prepare.py").write_text(script)
    missing = run()
    assert missing.returncode == 1
    assert "117 held-out clips are not there" in missing.stderr

    present = [clip.stem for clip in data.glob("clones/*/*/*") if clip.suffix in (".wav", ".flac")]
    names = [name for name in (recipe / "heldout.txt").read_text().split() if name.partition("_")[2] in present]
    (recipe / "heldout.txt").write_text("\n".join(names) + "\n")
    done = run()
    assert done.returncode == 0, done.stderr
    assert packed_texts(data / "train") == {f"{voice}_seen": f"Seen by {voice}." for voice in VOICES}
    assert packed_texts(data / "heldout") == dict.fromkeys(names, "Held out.")


def packed_texts(folder: Path) -> dict[str, str]:
    clips = iterate_clips([folder], sampling_rate=24000, num_channels=1)
    return {name: labels["text"] for name, _, labels in clips}


@pytest.mark.processes
def test_cc0_voices_of_a_folder_that_is_there(tmp_path: Path, place: Callable) -> None:
    for part in ("train", "heldout"):
        place(tmp_path / "voices" / f"{part}.flac")
        (tmp_path / "voices" / f"{part}.jsonl").write_text(
            json.dumps({"id": part, "path": f"{part}.flac", "text": "Yes."})
        )
    variables = {"PYTHON": sys.executable, "PYTHONPATH": str(RECIPES.parent), "CC0_MIRROR": "file:///nowhere"}

    def run(voices: Path) -> subprocess.CompletedProcess:
        environment = os.environ | variables | {"CC0_VOICES": str(voices)}
        command = ["bash", RECIPES / "cc0_voices" / "run.sh", tmp_path / "data"]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    assert run(tmp_path).returncode == 2
    done = run(tmp_path / "voices")
    assert done.returncode == 0, done.stderr
    assert packed_texts(tmp_path / "data" / "heldout") == {"heldout": "Yes."}


@pytest.mark.processes
def test_speed_copies_change_length_and_pitch_together(tmp_path: Path) -> None:
    tone = np.sin(2 * np.pi * 200 * np.arange(48000) / 48000)
    soundfile.write(tmp_path / "tone.wav", 0.3 * tone, 48000)
    entry = {"id": "tone", "path": "tone.wav", "text": "Hm.", "speaker": "anna", "language": "en"}
    (tmp_path / "train.jsonl").write_text(json.dumps(entry) + "\n")
    out = tmp_path / "speed90"
    script = RECIPES / "cc0_voices" / "speed_copies.py"
    subprocess.run([sys.executable, script, tmp_path / "train.jsonl", out, "0.9"], check=True)
    assert [json.loads(line) for line in (tmp_path / "speed90.jsonl").read_text().splitlines()] == [
        {"id": "tone_speed90", "path": str(out / "tone.flac"), "domain": "speed90", "language": "en", "speaker": "anna"}
    ]
    slow, rate = soundfile.read(out / "tone.flac")
    assert (rate, len(slow)) == (24000, -(-24000 * 10 // 9))
    assert np.abs(slow).max() == pytest.approx(0.7, abs=1e-3)
    spectrum = np.abs(np.fft.rfft(slow * np.hanning(len(slow))))
    assert spectrum.argmax() * rate / len(slow) == pytest.approx(180, abs=1)


def test_every_ablation_of_one_voice_composes_to_the_same_audio() -> None:
    script = runpy.run_path(str(RECIPES / "cc0_voices" / "ablate.py"))
    for name, change in script["CHANGES"].items():
        config = load_config("fit", [*script["RUN"], *change.split(), "data.train=shards"])
        assert sum(stage.updates * stage.batch_seconds for stage in config.stages) == pytest.approx(8640), name
