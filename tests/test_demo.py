"""The page of recipes/demo in a browser: audio is reconstructed, other files are refused, no network is needed."""

import importlib.util
import io
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from moss_train import MossAudioTokenizerConfig, MossAudioTokenizerModel
from moss_train.audio.io import read_audio

ROOT = Path(__file__).parents[1]
SPEECH, OTHER_SPEECH = sorted(
    (ROOT / "recipes" / "quickstart" / "audio" / "speech").glob("*.flac"), key=lambda path: -path.stat().st_size
)[:2]
LOCAL = ("127.0.0.1", "localhost", "::1", "0.0.0.0")
SECONDS = 2


def load_file(name: str) -> Any:
    """Import a file of recipes/demo."""
    spec = importlib.util.spec_from_file_location(f"demo_{name}", ROOT / "recipes" / "demo" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # gradio and dataclasses look it up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def app() -> Any:
    pytest.importorskip("gradio")
    pytest.importorskip("matplotlib")
    return load_file("app")


@pytest.fixture(scope="module")
def models(app) -> dict[str, MossAudioTokenizerModel]:
    """Return the committed model, and one with half as many levels and random weights."""
    trained = MossAudioTokenizerModel.from_pretrained(app.DEFAULT_MODEL).eval()
    settings = trained.config.to_dict()
    settings["quantizer_kwargs"] = settings["quantizer_kwargs"] | {"num_quantizers": 8}
    torch.manual_seed(0)
    return {"cat_mini": trained, "random": MossAudioTokenizerModel(MossAudioTokenizerConfig(**settings)).eval()}


@pytest.fixture(scope="module")
def outside() -> list[Any]:
    """Record addresses outside this machine that this process tries to reach."""
    return []


@pytest.fixture(scope="module")
def url(app, models, outside) -> Any:
    """Serve the page from this process and return its URL."""
    resolve = socket.getaddrinfo

    def watch(host: Any, *arguments: Any, **options: Any) -> Any:
        if host not in (None, "", *LOCAL):
            outside.append(host)
            raise socket.gaierror(f"{host}: there is no network here")
        return resolve(host, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", watch)
        blocks = app.build(models)
        _, url, _ = app.start(blocks, prevent_thread_lock=True, quiet=True)
        yield url
        blocks.close()


def open_page(browser: Any, url: str, outside: list[Any]) -> Any:
    opened = browser.new_page()
    opened.set_default_timeout(120_000)
    opened.on("request", lambda request: outside.append(request.url) if is_outside(request.url) else None)
    opened.goto(url)
    return opened


@pytest.fixture(scope="module")
def page(browser, url, outside) -> Any:
    """Open the page in a browser."""
    return open_page(browser, url, outside)


@pytest.fixture(scope="module")
def page_with_microphone(open_browser, url, outside, clip) -> Any:
    """Open the page in a browser whose microphone plays the clip in a loop."""
    device = ("--use-fake-device-for-media-stream", f"--use-file-for-fake-audio-capture={clip}")
    return open_page(open_browser(*device, "--use-fake-ui-for-media-stream"), url, outside)


def is_outside(url: str) -> bool:
    return url.startswith("http") and url.split("/")[2].rsplit(":", 1)[0] not in LOCAL


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """Write two seconds of speech."""
    samples, rate = soundfile.read(SPEECH, dtype="float32")
    path = tmp_path_factory.mktemp("clip") / "speech.wav"
    soundfile.write(path, samples[rate : (1 + SECONDS) * rate], rate)
    return path


def upload(page: Any, element: str, path: Path) -> None:
    """Upload a file to an input, replacing the current one."""
    if page.locator(f"#{element} button[aria-label='Clear']").count():
        page.click(f"#{element} button[aria-label='Clear']")
    with page.expect_response(lambda response: "/upload" in response.url and response.request.method == "POST"):
        page.set_input_files(f"#{element} input[type=file]", path)


def download(page: Any, element: str) -> bytes:
    """Return the file that a player would play."""
    return page.request.get(page.locator(f"#{element} a[download]").get_attribute("href")).body()


def heard(page: Any, element: str) -> tuple[np.ndarray, int]:
    """Return samples and rate of the file that a player would play."""
    return soundfile.read(io.BytesIO(download(page, element)))


def reconstruction(app: Any, model: MossAudioTokenizerModel, path: Path) -> np.ndarray:
    """Return the expected samples for a file, with all levels."""
    audio = app.read_clip(str(path), model, True).audio
    codes = model.encode(audio[None], return_dict=True).audio_codes
    return model.decode(codes, return_dict=True).audio[0, 0, : audio.shape[1]].numpy().clip(-1, 1)


def likeness(recording: Path, original: Path) -> float:
    """Return the mean over parts of 0.5 s of a recording of the best correlation with any place in the original."""
    parts, whole = (read_audio(path, sampling_rate=24000, num_channels=1)[0][0] for path in (recording, original))
    values = []
    for part in parts.unfold(0, 12000, 12000):
        size = len(whole) + len(part)
        product = torch.fft.irfft(torch.fft.rfft(whole, size) * torch.fft.rfft(part, size).conj(), size)
        energy = whole.unfold(0, len(part), 1).square().sum(dim=1) * part.square().sum()
        values.append(float((product[: len(energy)] / energy.clamp(min=1e-9).sqrt()).max()))
    return float(np.mean(values))


@pytest.mark.slow
def test_sound_comes_back_and_fewer_levels_are_fewer_bits(page, models, clip, app):
    upload(page, "source", clip)
    page.click("#reconstruct")
    page.wait_for_selector("#numbers:has-text('1,600 bit/s')")
    page.wait_for_selector("#restored a[download]")
    samples, rate = heard(page, "restored")

    expected = reconstruction(app, models["cat_mini"], clip)
    assert rate == 24000
    assert samples.shape == expected.shape == (SECONDS * 24000,)
    np.testing.assert_allclose(samples, expected, atol=1e-3)
    sizes = page.evaluate(
        "['spectrograms', 'codes'].map(name => document.querySelector(`#${name} img`)).map(i => i.naturalWidth)"
    )
    assert min(sizes) > 300

    page.fill("#model_levels input[type=number]", "4")
    page.press("#model_levels input[type=number]", "Enter")
    page.click("#reconstruct")
    page.wait_for_selector("#numbers:has-text('400 bit/s')")
    assert "4 x 25, 100 bytes" in page.inner_text("#numbers")


@pytest.mark.slow
def test_a_recording_of_the_microphone_comes_back(page_with_microphone, app, models, clip, tmp_path):
    page, recording = page_with_microphone, tmp_path / "recording.wav"
    page.click("#source button[aria-label='Record audio']")
    page.click("#source .record-button")
    page.wait_for_selector("#source .stop-button")
    page.wait_for_timeout(3000)
    with page.expect_response(lambda response: "/upload" in response.url and response.request.method == "POST"):
        page.click("#source .stop-button")
    page.wait_for_selector("#source a[download]")
    recording.write_bytes(download(page, "source"))
    page.click("#reconstruct")
    page.wait_for_selector("#numbers:has-text('1,600 bit/s')")
    page.wait_for_selector("#restored a[download]")
    samples, rate = heard(page, "restored")
    expected = reconstruction(app, models["cat_mini"], recording)
    assert rate == 24000
    assert samples.shape == expected.shape
    assert len(samples) > 24000
    np.testing.assert_allclose(samples, expected, atol=1e-3)
    # The browser changes level and noise, and the fake microphone has gaps on a busy machine.
    assert likeness(recording, clip) > 1.5 * likeness(recording, OTHER_SPEECH)


@pytest.mark.slow
def test_what_is_no_audio_is_refused_in_one_line(page, tmp_path):
    text = tmp_path / "notes.wav"
    text.write_text("This is a note, not a sound.\n")
    upload(page, "source", text)
    page.click("#reconstruct")
    line = page.wait_for_selector("[data-testid=toast-body] :text('notes.wav')").inner_text()
    assert line.startswith("notes.wav is not audio that libsndfile can read")
    assert "\n" not in line


@pytest.mark.slow
def test_two_models_are_compared(page, clip, outside):
    page.get_by_role("tab", name="Compare").click()
    upload(page, "other_source", clip)
    page.click("#compare")
    page.wait_for_selector("#numbers_A:has-text('1,600 bit/s')")
    page.wait_for_selector("#numbers_B:has-text('200 bit/s')")  # a quarter of the other model's 8 levels
    first, second = heard(page, "restored_A")[0], heard(page, "restored_B")[0]
    assert first.shape == second.shape == (SECONDS * 24000,)
    assert not np.array_equal(first, second)
    assert page.evaluate("document.querySelector('#both img').naturalWidth") > 300
    assert outside == []


def test_length_and_size_are_bounded(app, models, tmp_path):
    model = models["cat_mini"]
    long = tmp_path / "long.flac"
    soundfile.write(long, np.full(8000 * 40, 0.1), 8000)
    clip = app.read_clip(str(long), model, False)
    assert clip.audio.shape == (1, 24000 * 30)
    assert clip.remark == "the first 30 of 40.0 s"
    large = tmp_path / "large.wav"
    with large.open("wb") as file:
        file.truncate(app.MAX_BYTES + 1)
    with pytest.raises(app.gr.Error, match=r"large\.wav has 20 MiB, 20 are allowed"):
        app.read_clip(str(large), model, False)
    with pytest.raises(app.gr.Error, match="Record or upload"):
        app.read_clip(None, model, False)


def test_a_space_has_the_page_the_package_and_the_model(app, tmp_path):
    load_file("make_space").make_space(str(app.DEFAULT_MODEL), tmp_path / "space")
    there = {path.relative_to(tmp_path / "space").as_posix() for path in (tmp_path / "space").rglob("*")}
    assert there >= {"app.py", "README.md", "requirements.txt", "moss_train/__init__.py", "model/model.safetensors"}
    front = (tmp_path / "space" / "README.md").read_text().split("---")[1]
    assert "sdk: gradio" in front
    assert f"sdk_version: {app.gr.__version__}" in front
